"""Step times out of the lines that `qwen3next_plugin.recording` wrote."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One engine step: when its tokens were on the host (ns), its requests, tokens, and most tokens of one request."""

    time: int
    requests: int
    tokens: int
    most: int


def read_steps(directory: Path, begin: int = 0) -> list[Step]:
    """Steps that ended after ``begin`` (ns of `time.perf_counter_ns`), in order; half-written lines are passed over."""
    steps = []
    for file in directory.glob("steps-*.txt"):
        for line in file.read_text(encoding="ascii").splitlines():
            words = line.split()
            if len(words) == 4 and int(words[0]) >= begin:
                steps.append(Step(*map(int, words)))
    return sorted(steps, key=lambda step: step.time)


def decode_times(steps: Iterable[Step], requests: int) -> list[float]:
    """Milliseconds of every step in which exactly ``requests`` requests decoded one token each and nothing else ran.

    A step's time is the distance to the step before, which has to be of the same kind: so neither a prompt's tail nor
    the wait for new requests gets in. Steps before the second such one are left out.
    """
    return [gap for run in _runs(steps, requests) for gap in run]


def _runs(steps: Iterable[Step], requests: int) -> Iterator[list[float]]:
    last: Step | None = None
    gaps: list[float] = []
    for step in steps:
        if step.requests == step.tokens == requests and step.most == 1:
            if last is not None:
                gaps.append((step.time - last.time) / 1e6)
            last = step
        else:
            yield gaps[1:]
            last, gaps = None, []
    yield gaps[1:]


def expert_counts(directory: Path, tokens: int) -> list[float]:
    """Mean distinct experts of each layer over the passes of exactly ``tokens`` tokens; empty if there was none."""
    passes: list[list[int]] = []
    for file in directory.glob("experts-*.txt"):
        for line in file.read_text(encoding="ascii").splitlines():
            first, *counts = map(int, line.split())
            if first == tokens and counts:
                passes.append(counts)
    layers = {len(counts) for counts in passes}
    if len(layers) != 1:
        return []
    return [sum(column) / len(passes) for column in zip(*passes, strict=True)]
