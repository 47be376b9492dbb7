"""Which files of single operations may be believed."""

import math
from collections.abc import Iterator
from statistics import median
from typing import Any

from .bounds import fastest, seconds_of, share_of_ceiling
from .state import FORMAT

KINDS = ("kernels", "moe")
ENGINES = ("vllm", "sglang")
LEAST_REPEATS = 3
MOST_SHARE = 1.05
"""Of the measured ceiling: an H200 reads alone at 1.03 of the copy bandwidth, which is the ceiling."""
MOST_ERROR = 0.02
"""Relative error of this project's outputs, which bf16 sums and one rounding leave far below."""
MOST_APART = 0.25
"""How far the same kernel may be apart in the runs of one file."""
MOST_IN_KERNELS = 2
"""Of a series' own time: a kernel begins at most while the one in front of it runs, so no moment counts three times."""

_HEAD = ("commit", "plugin_version", "gpu", "runs", "rows")
_ROW = ("unit", "work", "own", "plugin", "plugin_is", "stock", "peer", "peers", "bytes", "flops", "products")
_ROW_MORE = ("share_of", "share_of_ceiling", "repeats", "spread", "relative_error", "timed", "why")
_MOE_ROW = ("stock_joined", "peer_joined", "useful_flops", "padded_flops", "config")
_CEILINGS = ("copy_gb_s", "bf16_tflop_s")


def check_parts(result: dict[str, Any]) -> list[str]:
    """What is wrong with the content of one, a sentence each."""
    if result.get("format") != FORMAT:
        return [f"format is {result.get('format')!r}: {FORMAT} is what this version reads."]
    missing = [key for key in _HEAD if key not in result]
    if missing:
        return [f"{key} is missing." for key in missing]
    findings = list(_head(result))
    if findings:
        return findings
    for row in result["rows"]:
        findings += [f"{row.get('case', 'a row')}: {finding}" for finding in _row(row, result)]
    return findings


def _head(result: dict[str, Any]) -> Iterator[str]:
    if not result["commit"]:
        yield "commit is empty: say which commit was measured (--commit)."
    elif result["commit"].endswith("+changes"):
        yield "commit: the checkout had changes that no commit holds."
    if not result["gpu"]:
        yield "gpu is empty."
    if not result["rows"]:
        yield "rows: there is none."
    engines = [run.get("engine") for run in result["runs"]]
    for engine in ENGINES:
        if engine not in engines:
            yield f"runs: {engine} was not run beside it, and may be the faster one."
    for run in result["runs"]:
        if any(not run.get("versions", {}).get(name) for name in ("torch", "triton")):
            yield f"runs: the versions of torch and triton with {run.get('engine')} are not known."
        if any(not run.get("ceilings", {}).get(key) for key in _CEILINGS):
            yield f"runs: the ceilings of copying and of matrix products were not measured with {run.get('engine')}."
        if not run.get("command"):
            yield f"runs: the command of {run.get('engine')} is missing."


def _row(row: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    wanted = (*_ROW, *_ROW_MORE, *(_MOE_ROW if result["kind"] == "moe" else ()))
    missing = [key for key in wanted if key not in row]
    if missing:
        yield f"{', '.join(missing)} missing."
        return
    yield from _measurements(row)
    yield from _summary(row)
    yield from _profiles(row)
    if row["share_of_ceiling"] is None:
        yield "share_of_ceiling is missing."
    else:
        yield from _share(row, result)


def _measurements(row: dict[str, Any]) -> Iterator[str]:
    """Whether every series was repeated, is right, and is what it says."""
    for run in ENGINES:
        if not any(name.split("-")[0] == run for name in row["peers"]):
            yield f"peers: nothing of {run} is named, not even why it could not run."
        if f"own@{run}" not in row["repeats"]:
            why = row["why"].get(f"own@{run}", "there is no word why")
            yield f"own was not measured beside {run}: {why}"
    for name, peer in row["peers"].items():
        if peer["value"] is None and not row["why"].get(name):
            yield f"peers: {name} has neither a value nor a reason."
        elif peer["value"] is not None and peer["value"] != median(row["repeats"].get(name) or [0.0]):
            yield f"peers: {name} is not the median of its repeats."
    for name, values in row["repeats"].items():
        if len(values) < LEAST_REPEATS:
            yield f"{len(values)} repeats of {name}, {LEAST_REPEATS} are wanted."
        error = row["relative_error"].get(name)
        if "@" in name and (error is None or not error <= MOST_ERROR):
            yield f"relative_error: the output of {name} is {error} away from the reference, {MOST_ERROR} is allowed."
    for name in ("own", "plugin"):
        medians = [median(values) for key, values in row["repeats"].items() if key.startswith(f"{name}@")]
        if len(medians) > 1 and max(medians) > (1 + MOST_APART) * min(medians):
            yield f"{name}: {min(medians)} and {max(medians)} {row['unit']} in two runs are too far apart."


def _summary(row: dict[str, Any]) -> Iterator[str]:
    """Whether the columns follow from the series: ours the slowest run, theirs the fastest."""
    medians = {name: median(values) for name, values in row["repeats"].items() if values}
    own = max((value for name, value in medians.items() if name.startswith("own@")), default=None)
    if row["own"] != own or own is None:
        yield f"own is {row['own']}, but its slowest run took {own}."
    plugins = [medians.get(name) for name in row["plugin_is"].values()]
    slowest = None if None in plugins else max((value for value in plugins if value is not None), default=None)
    if row["plugin"] != slowest or slowest is None:
        yield f"plugin is {row['plugin']}, but the slowest of what the model runs in the engines took {slowest}."
    for does, suffix in (("routed", ""), ("joined", "_joined")):
        if f"stock{suffix}" not in row:
            continue
        stock, peer = fastest(row["peers"], does)
        if row[f"stock{suffix}"] != stock:
            yield f"stock{suffix} is {row[f'stock{suffix}']}, but the fastest engine by itself took {stock}."
        if row[f"peer{suffix}"] != peer:
            yield f"peer{suffix} is {row[f'peer{suffix}']}, but the fastest of all took {peer}."
    # In microseconds, a launch from Python would be counted as if it were the kernel's own time.
    for name, how in row["timed"].items():
        if how != "graph" and ("@" in name or ("-" not in name and row["unit"] == "us")):
            yield f"timed: {name} was launched from Python, not in a graph: its time is not its kernels'."


def _share(row: dict[str, Any], result: dict[str, Any]) -> Iterator[str]:
    if row["share_of_ceiling"] > MOST_SHARE:
        yield f"share_of_ceiling is {row['share_of_ceiling']}: bytes, products, ceilings or clock are wrong."
    engine = row["share_of"].partition("@")[2]
    ceilings = next((run["ceilings"] for run in result["runs"] if run["engine"] == engine), None)
    values = row["repeats"].get(row["share_of"])
    if ceilings is None or not values:
        yield f"share_of: {row['share_of']!r} was not measured."
        return
    found, _ = share_of_ceiling(row, median(values), ceilings)
    if abs(found - row["share_of_ceiling"]) > 0.01 * found:
        yield f"share_of_ceiling is {row['share_of_ceiling']}, but bytes, products and ceilings make it {found}."


def _profiles(row: dict[str, Any]) -> Iterator[str]:
    """Whether profiles, where there are any, are of what was timed and no longer than that."""
    for name, found in row.get("profile", {}).items():
        if found.get("why"):
            continue
        kernels = found.get("kernels") or [{}]
        if not all(
            kernel.get("name") and _is_positive(kernel.get("us")) and _is_positive(kernel.get("launches"))
            for kernel in kernels
        ):
            yield f"profile: {name} has no kernels, or one without its name, microseconds or launches."
            continue
        total = math.fsum(kernel["us"] for kernel in kernels)
        if not _is_positive(found.get("us")) or abs(found["us"] - total) > 0.01 * total:
            yield f"profile: {name} is {found.get('us')} us, but its kernels take {total:.5g}."
        values = row["repeats"].get(name)
        if not values:
            yield f"profile: {name} was not timed."
        elif total > MOST_IN_KERNELS * 1e6 * seconds_of(median(values), row["unit"]):
            yield f"profile: the kernels of {name} take {total:.5g} us, and its repeats {median(values)} {row['unit']}."


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and value > 0
