"""From times at some shapes to a few rules with thresholds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

C = TypeVar("C", bound=Hashable)

At = tuple[int, ...]
Times = Mapping[At, Mapping[C, float]]
"""Seconds by place and candidate; what was not measured at a place is not chosen there."""

MOST = 4
GAIN = 0.03
"""A further rule has to save so much of one shape's time, or of several shapes' together, another default half of it:
less lies within the noise, and each rule is a kernel to compile."""

_NEVER = 10.0  # log of how much worse a place is for what was not measured there, or is wrong


@dataclass(frozen=True)
class Step(Generic[C]):
    """``candidate`` from these thresholds on, in every dimension; of several steps the first that fits decides."""

    candidate: C
    least: At


def deciding(steps: Sequence[Step[C]], at: At) -> Step[C]:
    """The step that decides there."""
    return next(step for step in steps if all(here >= least for here, least in zip(at, step.least, strict=True)))


def cost(steps: Sequence[Step[C]], times: Times[C]) -> float:
    """How much slower than the fastest at each place: logarithms, summed."""
    total = 0.0
    for at, measured in times.items():
        best, taken = min(measured.values()), measured.get(deciding(steps, at).candidate, math.inf)
        total += min(math.log(taken / best), _NEVER) if taken < math.inf else _NEVER
    return total


def fit(times: Times[C], defaults: Sequence[C], candidates: Sequence[C]) -> list[Step[C]]:
    """A default for everything (of ``defaults``, the first unless another is clearly better), and steps before it.

    A step is added as long as one saves `GAIN`: the one that saves most, with the highest thresholds that give it the
    same places, so that nothing is said of shapes smaller than those measured.
    """
    grown = [_grow(times, default, candidates) for default in defaults]
    scores = [cost(steps, times) + GAIN * len(steps) for steps in grown]
    best = min(range(len(grown)), key=lambda number: scores[number])
    return grown[best if scores[best] < scores[0] - GAIN / 2 else 0]


def _grow(times: Times[C], default: C, candidates: Sequence[C]) -> list[Step[C]]:
    places = list(times)
    nothing: At = (0,) * len(places[0])
    steps = [Step(default, nothing)]
    thresholds = list(itertools.product(*(sorted(set(axis)) for axis in zip(*places, strict=True))))
    while len(steps) < MOST:
        found = [
            [*steps[:where], Step(candidate, least), *steps[where:]]
            for candidate in candidates
            for least in thresholds
            for where in range(len(steps))
        ]
        better = min(
            found, key=lambda tried: (round(cost(tried, times), 6), [-n for step in tried for n in step.least])
        )
        if cost(better, times) > cost(steps, times) - GAIN:
            break
        steps = better
    return [step for step in steps[:-1] if any(deciding(steps, at) is step for at in places)] + steps[-1:]
