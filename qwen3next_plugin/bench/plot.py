"""Pictures of result files, where matplotlib is installed."""

import json
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError

from .kernels.check import KINDS
from .kernels.plot import plot_shares

_SERIES = (("stock_vllm", "stock vLLM"), ("stock_sglang", "stock SGLang"), ("plugin", "plugin"), ("floor", "floor"))


def pyplot_for_files() -> Any:
    """matplotlib's pyplot, drawing without a display. Raises SettingsError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise SettingsError("matplotlib is not installed: `pip install matplotlib`, then run it again.") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def plot_result(path: Path, out: Path | None = None) -> Path:
    """One bar chart a kind of row, or the shares of the ceiling where single operations were measured; as PNG beside
    the result file or at ``out``. Raises SettingsError without matplotlib."""
    pyplot = pyplot_for_files()
    result = json.loads(path.read_text(encoding="utf-8"))
    rows = result["rows"]
    target = out or path.with_suffix(".png")
    if result.get("kind") in KINDS:
        return plot_shares(pyplot, result, target)
    kinds = list(dict.fromkeys(_kind(row) for row in rows))
    figure, axes = pyplot.subplots(1, len(kinds), figsize=(2 + 4 * len(kinds), 4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        _bars(axis, [row for row in rows if _kind(row) == kind], kind)
    figure.suptitle(path.stem)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _kind(row: dict[str, Any]) -> str:
    name = str(row["case"])
    return "start" if name.endswith("-start") else name.split("-")[0]


def _bars(axis: Any, rows: list[dict[str, Any]], kind: str) -> None:
    shown = {label: [row[key] for row in rows] for key, label in _SERIES if any(row[key] is not None for row in rows)}
    grouped_bars(axis, [str(row["case"]).removeprefix(f"{kind}-") for row in rows], shown)
    axis.set_title(kind)
    axis.set_ylabel(rows[0]["unit"])
    if max(row["plugin"] or 0 for row in rows) > 20 * min((row["plugin"] or 1e9) for row in rows):
        axis.set_yscale("log")


def grouped_bars(axis: Any, ticks: list[str], series: dict[str, list[float | None]]) -> None:
    """A group of bars a tick, one bar a series; missing values are gaps."""
    width = 0.8 / max(len(series), 1)
    for n, (label, values) in enumerate(series.items()):
        places = [i + (n - (len(series) - 1) / 2) * width for i in range(len(ticks))]
        axis.bar(places, [value or 0.0 for value in values], width, label=label)
    axis.set_xticks(range(len(ticks)), ticks, rotation=30)
    axis.legend(fontsize="small")
