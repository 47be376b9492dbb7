"""Single operations beside both engines on one machine.

Most of a first run is compilers' time. So all rows are rehearsed first, many processes side by side, and then measured
by one process at a time, while nothing else runs.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.serve.processes import running, stop_on_termination

from ..engines import EngineSetup
from .cases import ALL_CASES, Kind, family_and_size, parse_cases, profiled_among
from .command import GPU_LOST

_MOST_JOBS = 16
_TRIES = 3  # of a run that loses the GPU
_RUN = "from qwen3next_plugin.cli import main; import sys; sys.argv[0] = 'qwen3next'; main()"


@dataclass(frozen=True)
class Request:
    """What is asked for: rows of either kind, where the engines are, where results and logs go, how long and how many
    rehearsals side by side (None: as the machine has cores), the commit that is measured, and which rows to profile.
    """

    rows: str
    setups: Mapping[str, EngineSetup]
    out: Path
    work: Path
    minutes: float | None = None
    jobs: int | None = None
    commit: str | None = None
    profile: str = ""


@dataclass(frozen=True)
class _Process:
    """One `qwen3next bench kernels` or `moe`."""

    kind: Kind
    engine: str
    rows: str
    further: tuple[str, ...]
    name: str

    def command(self, setup: EngineSetup) -> list[str]:
        words = ["bench", self.kind, "--peers", self.engine, "--rows", self.rows, *self.further]
        return [setup.python, "-c", _RUN, *words]


def rows_of(text: str) -> dict[Kind, list[str]]:
    """Cases of each kind by names and patterns, "all" being every one. Raises SettingsError for what neither has."""
    found: dict[Kind, list[str]] = {"kernels": [], "moe": []}
    for word in filter(None, (part.strip() for part in text.split(","))):
        refused = []
        for kind in ALL_CASES:
            try:
                found[kind] += [case.name for case in parse_cases(kind, word)]
            except SettingsError as error:
                refused.append(error)
        if len(refused) == len(ALL_CASES):
            raise refused[0]
    return {kind: list(dict.fromkeys(names)) for kind, names in found.items() if names}


def rehearsals(rows: Mapping[Kind, list[str]], engines: list[str]) -> list[_Process]:
    """Cases that share their inputs' weights, or most of their kernels, in one process."""
    found = []
    for kind, names in rows.items():
        families: dict[str, list[str]] = {}
        for name in names:
            families.setdefault(family_and_size(name)[0], []).append(name)
        for engine in engines:
            for family, members in families.items():
                name = f"rehearsal-{engine}-{family}"
                found.append(_Process(kind, engine, ",".join(members), ("--rehearse",), name))
    return found


def run_both(request: Request) -> None:
    """Rehearses, then measures: `session.run_parts` says what is written. What fails in a rehearsal fails again, and
    is said, in its run. Raises SettingsError for a bad request or a run that ended with an error.
    """
    rows, engines = rows_of(request.rows), list(request.setups)
    profiled = profiled_among([name for names in rows.values() for name in names], request.profile)
    begin = time.monotonic()
    stop_on_termination()
    jobs = min(len(os.sched_getaffinity(0)), _MOST_JOBS) if request.jobs is None else request.jobs
    variables = {engine: setup.variables() for engine, setup in request.setups.items()}
    if jobs:
        _rehearse(request, rehearsals(rows, engines), variables, jobs)
    for kind, names in rows.items():
        for engine in engines:
            mine = ",".join(name for name in names if name in profiled)
            further = ["--profile", mine] if mine else []
            further += ["--out", str(request.out.absolute())]
            further += [] if request.commit is None else ["--commit", request.commit]
            if request.minutes is not None:
                left = request.minutes - (time.monotonic() - begin) / 60
                further += ["--minutes", f"{max(left, 0.0):.2f}"]
            process = _Process(kind, engine, ",".join(names), tuple(further), f"{kind}-{engine}")
            _measure(request, process, variables[engine])


def _rehearse(request: Request, processes: list[_Process], variables: Mapping[str, Any], jobs: int) -> None:
    begin = time.monotonic()
    with ExitStack() as started:
        pool = ThreadPoolExecutor(jobs)

        def rehearse(process: _Process) -> None:
            command, log = process.command(request.setups[process.engine]), request.work / f"{process.name}.log"
            started.enter_context(running(command, log, variables[process.engine])).wait()

        try:
            for done, _ in enumerate(pool.map(rehearse, processes), start=1):
                print(f"{done} of {len(processes)} rehearsed, {time.monotonic() - begin:.0f} s", flush=True)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # what runs is stopped on the way out


def _measure(request: Request, process: _Process, variables: Mapping[str, str]) -> None:
    """One run, its lines shown as they come."""
    command, log = process.command(request.setups[process.engine]), request.work / f"{process.name}.log"
    for _ in range(_TRIES):
        shown = log.stat().st_size if log.exists() else 0
        with running(command, log, variables) as child, log.open(encoding="utf-8", errors="replace") as lines:
            lines.seek(shown)
            while child.poll() is None:
                _show(lines.read())
                time.sleep(0.2)
            _show(lines.read())
        if child.returncode != GPU_LOST:
            break
    if child.returncode:
        raise SettingsError(
            f"{process.kind} beside {process.engine} ended with exit code {child.returncode}: see {log}."
        )


def _show(text: str) -> None:
    print(text, end="", flush=True)
