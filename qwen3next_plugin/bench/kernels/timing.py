"""How long calls take on a GPU: in a CUDA graph of all of them, replayed for some milliseconds, several times."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import torch

from .work import Call

REPEATS = 5
REPEAT_MS = 10.0
_NO_GPU = "There is no NVIDIA GPU here that PyTorch can use, and kernels are measured on one: run it there."


@dataclass(frozen=True)
class Times:
    """Seconds a call, a value a repeat; how: "graph", or "eager" where the calls would not be captured."""

    seconds: tuple[float, ...]
    how: str


class Timer(Protocol):
    """What times calls; a test has one that does not."""

    def __call__(self, calls: Sequence[Call]) -> Times:
        """Times of one call, after all of them ran once."""
        ...

    def alive(self) -> bool:
        """Whether the GPU still answers."""
        ...


class GraphTimer:
    """Times on the current GPU."""

    def __call__(self, calls: Sequence[Call]) -> Times:
        """As `Timer`."""
        launch, how = launcher(calls)
        return Times(_repeated(launch, len(calls)), how)

    def alive(self) -> bool:
        """Whether a small tensor can be made and read back."""
        try:
            return float(torch.ones(1, device="cuda").item()) == 1.0
        except Exception:
            return False


class EagerTimer(GraphTimer):
    """Times calls as Python launches them: the host's time where it takes longer than the GPU. So prompts run."""

    def __call__(self, calls: Sequence[Call]) -> Times:
        """As `Timer`."""
        all_calls = partial(_one_after_another, calls)
        all_calls()
        torch.cuda.synchronize()
        return Times(_repeated(all_calls, len(calls)), "eager")


class OnceTimer(GraphTimer):
    """Runs everything once, for what is compiled by that: its times mean nothing."""

    def __call__(self, calls: Sequence[Call]) -> Times:
        """As `Timer`."""
        return Times((_milliseconds(partial(_one_after_another, calls), 1) * 1e-3 / len(calls),), "once")


def graph_timer(kind: type[GraphTimer] = GraphTimer) -> GraphTimer:
    """A timer for the current GPU. Raises RuntimeError where there is none."""
    if not torch.cuda.is_available():
        raise RuntimeError(_NO_GPU)
    return kind()


def launcher(calls: Sequence[Call]) -> tuple[Callable[[], None], str]:
    """What launches all calls on the current GPU, after they ran once, and how, as in `Times`.

    What cannot be captured (it asks the GPU for a value) is launched from Python. Raises RuntimeError where the GPU is
    lost.
    """
    all_calls = partial(_one_after_another, calls)
    all_calls()  # compiles, tunes itself
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            all_calls()
    except Exception:
        torch.cuda.synchronize()  # raises where the GPU is lost
        return all_calls, "eager"
    return graph.replay, "graph"


def times_a_repeat(action: Callable[[], None]) -> int:
    """How often an action has to run on the GPU for REPEAT_MS, at least once."""
    return max(1, round(REPEAT_MS / max(_milliseconds(action, 2), 1e-3)))


def _one_after_another(calls: Sequence[Call]) -> None:
    for call in calls:
        call()


def _repeated(action: Callable[[], None], calls: int) -> tuple[float, ...]:
    times = times_a_repeat(action)
    return tuple(_milliseconds(action, times) * 1e-3 / calls for _ in range(REPEATS))


def _milliseconds(action: Callable[[], None], times: int) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(times):
        action()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / times
