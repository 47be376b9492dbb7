"""One run: every case, this project's kernels and one engine's beside them, until time is up."""

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from qwen3next_plugin.config import Qwen3NextSpec

from .bounds import rounded
from .cases import Case
from .peers import Prepare, peers_of
from .state import DIED, PartState
from .timing import Timer
from .work import Engine, Prepared, Work

Build = Callable[[Case, Qwen3NextSpec, Engine, torch.device], Work]

_WHY_CHARACTERS = 240
_TRIES = 3  # of a series whose repeats are apart
_MOST_APART = 0.05
_MOST_ERROR = 0.1  # of another's output: more than rounding to FP8 makes, so it was not called as it wants to be


def _given(prepared: Prepared) -> Prepare:
    return lambda work: [prepared]


def disturbed(values: list[float]) -> bool:
    """Whether repeats are so far apart that something else ran beside them; the shortest and the longest may be."""
    inner = sorted(values)[1:-1]
    return len(inner) > 1 and inner[-1] - inner[0] > _MOST_APART * inner[len(inner) // 2]


class GpuLostError(Exception):
    """The GPU answers no more in this process: a new one can go on from the state file."""


def one_line(error: BaseException) -> str:
    """An error as a row shows it."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:_WHY_CHARACTERS].rstrip(": ")


class Run:
    """Measures cases into ``state``; ``said`` is told what happens."""

    def __init__(
        self, state: PartState, spec: Qwen3NextSpec, engine: Engine, device: torch.device, timer: Timer, build: Build
    ) -> None:
        self.state, self.spec, self.engine, self.device = state, spec, engine, device
        self.timer, self.build = timer, build
        self.said: Callable[[str], None] = print

    def cases(self, cases: list[Case], deadline: float | None, after: Callable[[], None]) -> None:
        """Every case that the state lacks; ``after`` is called behind each. None begins after ``deadline``
        (`time.monotonic`). Raises GpuLostError.
        """
        for case in cases:
            if self.state.data["rows"].get(case.name, {}).get("done"):
                continue
            if deadline is not None and time.monotonic() > deadline:
                self.said("time is up: run the same command again for the rest")
                return
            with torch.no_grad():
                self.case(case)
            after()

    def case(self, case: Case) -> None:
        """One case. What raises becomes an entry that says why."""
        row = self.state.data["rows"].setdefault(case.name, {"series": {}, "done": False})
        died = self.state.died_at()
        if died is not None and died[0] == case.name:
            row["series"][died[1]] = {"value": None, "why": DIED}
        self.state.attempt(case.name, "own")
        try:
            work = self.made(case)
        except Exception as error:
            row["series"]["own"] = {"value": None, "why": one_line(error)}
            self._close(row, f"{case.name}: {one_line(error)}")
            return
        row |= {
            "unit": case.unit,
            "work": work.text,
            "bytes": work.bytes,
            "flops": work.flops,
            "products": work.products,
            "share_of": work.share_of,
            "engine_runs": work.engine_runs,
            "copies": len(work.inputs),
            "facts": work.facts,
        }
        for name, prepare in self._series(work):
            if name not in row["series"]:
                self.state.attempt(case.name, name)
                row["series"][name] = self._measured(work, prepare, case.unit)
                if not self.timer.alive():
                    self.state.ended()
                    raise GpuLostError(f"the GPU was lost with {name} in {case.name}: run the same command again.")
        found = ", ".join(f"{name} {one['value']}" for name, one in row["series"].items())
        self._close(row, f"{case.name}: {found} {case.unit}")

    def made(self, case: Case) -> Work:
        """The case with its inputs on the device. Raises whatever stops them from being made."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()  # what is free decides how many copies of the inputs are made
        return self.build(case, self.spec, self.engine, self.device)

    def _close(self, row: dict[str, Any], said: str) -> None:
        row["done"] = True
        self.state.ended()
        self.said(said)

    def _series(self, work: Work) -> Iterator[tuple[str, Prepare]]:
        for name, prepared in work.own.items():
            yield name, _given(prepared)
        yield from peers_of(self.engine, work.case.op)

    def _measured(self, work: Work, prepare: Prepare, unit: str) -> dict[str, Any]:
        """The fastest of what ``prepare`` gives, as a series of the row."""
        try:
            best: dict[str, Any] | None = None
            failed: Exception | None = None
            for prepared in prepare(work):
                try:
                    found = self._timed(work, prepared, unit)
                except Exception as error:  # one of several configs may not fit
                    failed = error
                    continue
                if best is None or found["value"] < best["value"]:
                    best = found
            if best is None:
                raise failed or RuntimeError("there is nothing to run")
            return best
        except Exception as error:
            return {"value": None, "why": one_line(error)}

    def _timed(self, work: Work, prepared: Prepared, unit: str) -> dict[str, Any]:
        error = work.error(prepared)
        if error > _MOST_ERROR:
            raise ValueError(f"its output is {error:.2g} away from the reference's, {_MOST_ERROR} is allowed")
        for _ in range(_TRIES):
            times = self.timer(prepared.calls)
            values = [rounded(seconds * (1e3 if unit == "ms" else 1e6)) for seconds in times.seconds]
            if not disturbed(values):
                break
        middle = sorted(values)[len(values) // 2]
        return {
            "value": middle,
            "repeats": values,
            "spread": rounded((max(values) - min(values)) / middle),
            "relative_error": rounded(error),
            "timed": times.how,
            **({"does": prepared.does} if prepared.does else {}),
            **prepared.facts,
        }
