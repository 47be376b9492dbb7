"""A picture of single operations: which share of the machine's ceiling each reaches, against its size."""

from pathlib import Path
from statistics import median
from typing import Any

from .bounds import share_of_ceiling
from .cases import family_and_size


def plot_shares(pyplot: Any, result: dict[str, Any], target: Path) -> Path:
    """One panel a family of cases, by the same bytes and products: what the model runs in the slower engine, this
    project's own kernels where that is something else, and the fastest engine's.
    """
    families: dict[str, list[tuple[int, dict[str, Any]]]] = {}
    for row in result["rows"]:
        if row.get("share_of_ceiling") is not None:
            family, size = family_and_size(row["case"])
            families.setdefault(family, []).append((size, row))
    columns = min(4, max(1, len(families)))
    rows = -(-max(1, len(families)) // columns)
    figure, axes = pyplot.subplots(rows, columns, figsize=(4 * columns, 3 * rows), squeeze=False, sharey=True)
    for axis in axes.flat[len(families) :]:
        axis.set_visible(False)
    for axis, (family, points) in zip(axes.flat, families.items(), strict=False):
        points.sort(key=lambda point: point[0])
        own = [(size, row["share_of_ceiling"]) for size, row in points if row["share_of"].startswith("own")]
        served = [(size, _served_share(row)) for size, row in points]
        stock = [(size, _stock_share(row, result)) for size, row in points]
        if all(row["plugin"] and row["own"] == row["plugin"] for _, row in points):
            own = []
        for label, line, style in (("plugin", served, "C0o-"), ("own kernels", own, "C2^:"), ("stock", stock, "C1s--")):
            known = [(size, share) for size, share in line if share is not None]
            if known:
                axis.plot(*zip(*known, strict=True), style, label=label)
        axis.set_xscale("log", base=2)
        axis.set_ylim(0.0, 1.05)
        axis.set_title(family, fontsize="small")
        axis.legend(fontsize="small")
    axes[0][0].set_ylabel("share of ceiling")
    figure.suptitle(f"{result['kind']}, {result['gpu']}")
    figure.tight_layout()
    figure.savefig(target, dpi=120)
    pyplot.close(figure)
    return target


def _served_share(row: dict[str, Any]) -> float | None:
    """Of what the model runs; the row's own share may be of kernels that an engine does not let it run."""
    if row["plugin"] is None:
        return None
    return float(row["share_of_ceiling"] * median(row["repeats"][row["share_of"]]) / row["plugin"])


def _stock_share(row: dict[str, Any], result: dict[str, Any]) -> float | None:
    """Of the fastest engine that does the same work as what the share is of."""
    value = row["stock_joined"] if row["share_of"].startswith("plugin") and "stock_joined" in row else row["stock"]
    if value is None:
        return None
    names = [name for name, values in row["repeats"].items() if "@" not in name and median(values) == value]
    engine = names[0].split("-")[0] if names else None
    ceilings = next((run["ceilings"] for run in result["runs"] if run["engine"] == engine), None)
    return None if ceilings is None else share_of_ceiling(row, value, ceilings)[0]
