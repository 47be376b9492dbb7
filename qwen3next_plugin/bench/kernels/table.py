"""A result file of single operations as a Markdown table."""

from statistics import median
from typing import Any

_NAMES = ("vllm", "sglang", "torch", "triton")
_NAMED = {"vllm": "stock vLLM", "sglang": "stock SGLang"}


def parts_table(result: dict[str, Any]) -> str:
    """One line a case, a pair of columns an engine; experts have one without the shared expert and one with it."""
    moe, engines = result["kind"] == "moe", [run["engine"] for run in result["runs"]]
    pairs = (
        [("stock", "own"), ("stock, shared joined", "plugin")] if moe else [(_NAMED[one], "plugin") for one in engines]
    )
    head = ["row", *(text for pair in pairs for text in (*pair, "speed-up")), "of ceiling"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in result["rows"]:
        cells = [str(row["case"])]
        for one, other in _of_experts(row) if moe else [_of_engine(row, engine) for engine in engines]:
            cells += [_cell(one, row), _cell(other, row), f"{one / other:.2f}x" if one and other else ""]
        share = row.get("share_of_ceiling")
        lines.append(f"| {' | '.join([*cells, '' if share is None else f'{share:.0%}'])} |")
    return "\n".join([*lines, "", _caption(result), ""])


def _of_experts(row: dict[str, Any]) -> list[tuple[float | None, float | None]]:
    return [(row.get("stock"), row.get("own")), (row.get("stock_joined"), row.get("plugin"))]


def _of_engine(row: dict[str, Any], engine: str) -> tuple[float | None, float | None]:
    """What the engine takes by itself, and with the plugin."""
    repeats = row.get("repeats", {})
    stock, plugin = (repeats.get(name) for name in (engine, row.get("plugin_is", {}).get(engine)))
    return median(stock) if stock else None, median(plugin) if plugin else None


def _cell(value: float | None, row: dict[str, Any]) -> str:
    return "" if value is None else f"{value:.3g} {row['unit']}" if value < 1000 else f"{value:.0f} {row['unit']}"


def _caption(result: dict[str, Any]) -> str:
    runs = []
    for run in result["runs"]:
        versions, ceilings = run["versions"], run["ceilings"]
        said = ", ".join(f"{name} {versions[name]}" for name in _NAMES if name in versions)
        runs.append(f"{said}, copy {ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bf16_tflop_s']:.3g} TFLOP/s")
    return (
        f"{result['gpu']}; {'; '.join(runs)}. Medians; of experts, and for the share, the slower run of ours and "
        'the faster of the stock engines; "of ceiling" is the least time that bytes and products allow over the time '
        "taken."
    )
