"""A picture of a tuning, in the style of the result files' pictures."""

from collections.abc import Sequence
from pathlib import Path

from qwen3next_plugin.bench.plot import grouped_bars, pyplot_for_files

from .search import Winner


def plot_winners(winners: Sequence[Winner], title: str, target: Path) -> Path:
    """Microseconds before and after by number of tokens, as PNG. Raises SettingsError without matplotlib."""
    pyplot = pyplot_for_files()
    figure, axis = pyplot.subplots(figsize=(2 + 0.6 * len(winners), 4))
    before: list[float | None] = [
        1e6 * winner.before_seconds if winner.before_seconds < float("inf") else None for winner in winners
    ]
    after: list[float | None] = [1e6 * winner.seconds for winner in winners]
    grouped_bars(axis, [str(winner.tokens) for winner in winners], {"before": before, "after": after})
    axis.set_xlabel("tokens")
    axis.set_ylabel("us")
    axis.set_yscale("log")
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target
