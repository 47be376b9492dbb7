"""A result file of single operations as a Markdown table."""

from typing import Any

_NAMES = ("vllm", "sglang", "torch", "triton")


def parts_table(result: dict[str, Any]) -> str:
    """One line a case; experts have a pair of columns without the shared expert and one with it."""
    pairs = [("stock", "own"), ("stock_joined", "plugin")] if result["kind"] == "moe" else [("stock", "plugin")]
    titles = {"stock": "stock", "own": "own", "stock_joined": "stock, shared joined", "plugin": "plugin"}
    head = ["row", *(text for pair in pairs for text in (*(titles[key] for key in pair), "speed-up")), "of ceiling"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in result["rows"]:
        cells = [str(row["case"])]
        for theirs, ours in pairs:
            one, other = row.get(theirs), row.get(ours)
            cells += [_cell(one, row), _cell(other, row), f"{one / other:.2f}x" if one and other else ""]
        share = row.get("share_of_ceiling")
        lines.append(f"| {' | '.join([*cells, '' if share is None else f'{share:.0%}'])} |")
    return "\n".join([*lines, "", _caption(result), ""])


def _cell(value: float | None, row: dict[str, Any]) -> str:
    return "" if value is None else f"{value:.3g} {row['unit']}" if value < 1000 else f"{value:.0f} {row['unit']}"


def _caption(result: dict[str, Any]) -> str:
    runs = []
    for run in result["runs"]:
        versions, ceilings = run["versions"], run["ceilings"]
        said = ", ".join(f"{name} {versions[name]}" for name in _NAMES if name in versions)
        runs.append(f"{said}, copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bf16_tflop_s']:.3g} TFLOP/s")
    return (
        f"{result['gpu']}; {'; '.join(runs)}. Medians; of ours the slower run, of the stock engines the faster; "
        '"of ceiling" is the least time that bytes and products allow over the time taken.'
    )
