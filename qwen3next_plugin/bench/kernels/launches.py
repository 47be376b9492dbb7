"""Where a row's time goes: this project's series once more under a profiler, GPU time a call kernel by kernel.

A profiler slows launches down for as long as the process lives, so nothing may be timed behind it.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from ..profile import NAME_CHARACTERS, Launch, read_trace
from .bounds import OWN, rounded
from .cases import Case
from .measure import GpuLostError, Run, one_line
from .state import DIED
from .timing import launcher, times_a_repeat
from .work import Call

Profiler = Callable[[Sequence[Call]], tuple[list[Launch], int]]
"""Gives the GPU's work by start, and of how many calls it is; a test has one that needs no GPU."""


def profile_cases(
    run: Run, cases: list[Case], profiler: Profiler, deadline: float | None, after: Callable[[], None]
) -> None:
    """Adds to the rows of these cases the profiles that ``run``'s state lacks; ``after`` is called behind each row.
    None begins after ``deadline`` (`time.monotonic`). What raises becomes an entry that says why. Raises GpuLostError.
    """
    for case in cases:
        row = run.state.data["rows"].get(case.name, {"series": {}})
        missing = _missing(row)
        if not missing:
            continue
        if deadline is not None and time.monotonic() > deadline:
            run.said("time is up: run the same command again for the other profiles")
            return
        with torch.no_grad():
            _profile_case(run, case, row.setdefault("profile", {}), missing, profiler)
        after()


def _missing(row: dict[str, Any]) -> list[str]:
    """Series to profile: a profile stands beside a time, and one that could not be timed may take the GPU with it."""
    timed = [name for name, one in row["series"].items() if name in OWN and one["value"] is not None]
    return [name for name in timed if name not in row.get("profile", {})]


def _profile_case(run: Run, case: Case, found: dict[str, Any], missing: list[str], profiler: Profiler) -> None:
    try:
        work = run.made(case)
    except Exception as error:
        found.update({name: {"why": one_line(error)} for name in missing})
        run.state.save()
        run.said(f"{case.name}, no profile: {one_line(error)}")
        return
    for name in missing:
        found[name] = {"why": DIED}  # what the file says if it does
        run.state.save()
        try:
            found[name] = by_kernel(*profiler(work.own[name].calls))
        except Exception as error:
            found[name] = {"why": one_line(error)}
        run.state.save()
        if not run.timer.alive():
            raise GpuLostError(f"the GPU was lost with a profile of {name} in {case.name}: run the same command again.")
    told = ", ".join(f"{name} {one['us']} us" if "us" in one else f"{name} {one['why']}" for name, one in found.items())
    run.said(f"{case.name}, in kernels: {told}")


def by_kernel(launches: Sequence[Launch], calls: int) -> dict[str, Any]:
    """GPU microseconds and launches a call, in the order of launch, and the sum of these microseconds.

    Where every call launches the same, what one call launches twice is two entries; else there is one a name. Raises
    RuntimeError if there are no launches.
    """
    if not launches:
        raise RuntimeError("the profiler saw nothing run on the GPU")
    groups = _by_place(launches, calls) or _by_name(launches)
    kernels = [
        {
            "name": group[0].name[:NAME_CHARACTERS],
            "us": rounded(sum(launch.length for launch in group) / calls),
            "launches": rounded(len(group) / calls),
        }
        for group in groups
    ]
    return {"kernels": kernels, "us": rounded(sum(launch.length for launch in launches) / calls)}


def _by_place(launches: Sequence[Launch], calls: int) -> list[Sequence[Launch]] | None:
    """The first launches of all calls, their second ones ...; None if calls differ."""
    each, rest = divmod(len(launches), calls)
    places = [launches[place::each] for place in range(each)]
    alike = all(launch.name == place[0].name for place in places for launch in place)
    return places if not rest and alike else None


def _by_name(launches: Sequence[Launch]) -> list[list[Launch]]:
    names: dict[str, list[Launch]] = {}
    for launch in launches:
        names.setdefault(launch.name, []).append(launch)
    return list(names.values())


def profiled_launches(calls: Sequence[Call]) -> tuple[list[Launch], int]:
    """As `Profiler`, on the current GPU: launched as they are timed, for as long as one repeat. Raises whatever they do
    or the profiler does.
    """
    launch, _ = launcher(calls)
    times = times_a_repeat(launch)
    with TemporaryDirectory() as folder:
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(times):
                launch()
            torch.cuda.synchronize()
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))  # a graph's kernels have their names and times in it, as others do
        return read_trace(trace), times * len(calls)
