"""Which candidates meet which shapes, and the rules that come out.

Of a group of shapes the scouts meet every candidate, the rest only those that were near our own best at one scout.
What is tried follows from what was measured, never from the clock, so a search that is taken up again goes the way it
would have gone. A rule's choice is checked against the reference at every shape that it decides on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.gdn.config_file import STATE_BYTES
from qwen3next_plugin.kernels.gdn.peer_trial import MOST_ERROR
from qwen3next_plugin.kernels.gdn.table import OWN, GdnTable, OwnPrefill, PrefillWay

from ..measuring import Measuring
from .rules import Step, deciding, fit
from .space import Candidate, Effort, Group, Heads, Shape, chosen_by, decodes, prefills, verifications

ALLOWED_ERROR = {"prefill": MOST_ERROR, "decode": 1e-2, "verify": 1e-2}
"""Relative, of outputs in bfloat16: products of bfloat16 in a prefill, as for an engine's function at its trial; one
rounding of the output and of a state in bfloat16 otherwise."""


@dataclass(frozen=True)
class Result:
    """What was found for a shape, times in seconds; ``times``: of every candidate that met it."""

    shape: Shape
    before: Candidate
    before_seconds: float
    chosen: Candidate
    seconds: float
    error: float
    machines: int
    times: dict[Candidate, float]


@dataclass(frozen=True)
class Part:
    """The rules for one group of shapes, and what they rest on.

    kept: candidates that met every shape; others: rules for where the peers that ``steps`` name are missing.
    """

    steps: tuple[Step[Candidate], ...]
    results: tuple[Result, ...]
    kept: tuple[Candidate, ...]
    others: tuple[Step[Candidate], ...] = ()


@dataclass(frozen=True)
class Planned:
    """A part that is to be found: its group of shapes, and how many measurements it takes at most."""

    group: Group
    count: int
    find: Callable[[], Part]


@dataclass
class Search:
    """One table's. ``before``: the shipped table; ``peers``: the engine's functions whose trial succeeded."""

    heads: Heads
    effort: Effort
    before: GdnTable
    peers: tuple[str, ...]
    measuring: Measuring[Shape, Candidate]
    seconds: dict[tuple[Shape, Candidate], float] = field(default_factory=dict)  # what was asked for, in this process

    def parts(self) -> Iterator[Planned]:
        """In the order in which they are to be found: some begin with what an earlier one left."""
        effort = self.effort
        group = prefills(effort)
        own = len(effort.chunks) + len(effort.stages) - 1
        yield Planned(group, len(group.shapes) * (own + len(self.peers) + 1), partial(self._prefill, group))
        for group, tiles in self._tiled():
            yield Planned(group, len(group.shapes) * (len(tiles) + 1), partial(self._tiles, group, tiles))

    def _tiled(self) -> Iterator[tuple[Group, Sequence[Candidate]]]:
        effort = self.effort
        for state_bytes in STATE_BYTES:
            yield decodes(effort, state_bytes), effort.decode
        for tokens in effort.drafts:
            for state_bytes in STATE_BYTES:
                yield verifications(effort, tokens, state_bytes), effort.verify

    def unmeasured(self) -> list[tuple[Shape, Candidate]]:
        """What the scouts are going to meet of ours. Stages come with every first kernel until the best is known."""
        prompts, known = prefills(self.effort), self.measuring.state.seconds
        chunks = bases = self._chunks()
        if all((shape, way) in known for shape in prompts.scouts for way in chunks):
            bases = [self._best_chunk(prompts)]
        ways: list[Candidate] = [*chunks, *(way for base in bases for way in self._staged(base))]
        met = (
            (shape, candidate)
            for group, candidates in ((prompts, ways), *self._tiled())
            for shape in group.scouts
            for candidate in (*candidates, self._ran_before(shape))
        )
        return [pair for pair in dict.fromkeys(met) if pair not in known and _is_own(pair[1])]

    def _chunks(self) -> list[PrefillWay]:
        return [PrefillWay(OWN, own) for own in self.effort.chunks]

    def _best_chunk(self, group: Group) -> PrefillWay:
        return min(self._chunks(), key=lambda way: self._together(group.scouts, way))

    def _staged(self, way: PrefillWay) -> list[PrefillWay]:
        own = way.own or OwnPrefill()
        return [PrefillWay(OWN, replace(own, walk_stages=stages)) for stages in self.effort.stages]

    def _prefill(self, group: Group) -> Part:
        """Our own variants and the peers. The kernels' times add up: stages are tried with the best first kernel."""
        known: list[Candidate] = [*self._chunks(), *(PrefillWay(peer) for peer in self.peers)]
        self._scouts(group, known)
        known += self._staged(self._best_chunk(group))
        times = self._times(group, known)
        part = self._part(times, [way for way in times.default_first() if _is_own(way)])
        named = {step.candidate for step in part.steps if not _is_own(step.candidate)}
        if not named:
            return part
        # For where the engine lacks them, or they cannot run a request: what would come next.
        rest = times.without(named)
        steps = self._checked(rest, [way for way in rest.default_first() if _is_own(way)])
        return replace(part, others=tuple(step for step in steps[:-1] if step not in part.steps))

    def _tiles(self, group: Group, tiles: Sequence[Candidate]) -> Part:
        times = self._times(group, tiles)
        return self._part(times, times.default_first())

    def _seconds(self, shape: Shape, candidate: Candidate) -> float:
        """Each is asked for once."""
        if (shape, candidate) not in self.seconds:
            self.seconds[shape, candidate] = self.measuring.seconds(shape, candidate)
        return self.seconds[shape, candidate]

    def _scouts(self, group: Group, candidates: Sequence[Candidate]) -> None:
        for shape in group.scouts:
            for candidate in self._with_before(shape, candidates):
                self._seconds(shape, candidate)

    def _together(self, shapes: Sequence[Shape], candidate: Candidate) -> float:
        return math.prod(self._seconds(shape, candidate) for shape in shapes)

    def _with_before(self, shape: Shape, candidates: Sequence[Candidate]) -> list[Candidate]:
        if shape not in self.measuring.state.before:
            self.measuring.state.add("before", shape, self._ran_before(shape))
        return list(dict.fromkeys((*candidates, self.measuring.state.before[shape])))

    def _ran_before(self, shape: Shape) -> Candidate:
        known = self.measuring.state.before.get(shape)
        return chosen_by(self.before, shape, self.heads, self.peers) if known is None else known

    def _times(self, group: Group, candidates: Sequence[Candidate]) -> Times:
        self._scouts(group, candidates)
        kept = []
        for candidate in dict.fromkeys(candidates):
            for shape in group.scouts:
                met = self._with_before(shape, candidates)
                if self._seconds(shape, candidate) <= self.effort.slack * self._best(shape, met):
                    kept.append(candidate)
                    break
        found = {}
        for shape in group.shapes:
            met = self._with_before(shape, candidates if shape in group.scouts else kept)
            found[shape] = {candidate: self._seconds(shape, candidate) for candidate in met}
        return Times(found, self.measuring.state.before, tuple(kept))

    def _best(self, shape: Shape, candidates: Sequence[Candidate]) -> float:
        """The shortest time of a right one of ours: a wrong one must not rule others out, nor a peer ours."""
        for candidate in sorted(filter(_is_own, candidates), key=lambda candidate: self._seconds(shape, candidate)):
            seconds = self._seconds(shape, candidate)
            if seconds < math.inf and self.measuring.error(shape, candidate) <= ALLOWED_ERROR[shape.op]:
                return seconds
        return math.inf

    def _checked(self, times: Times, defaults: Sequence[Candidate]) -> list[Step[Candidate]]:
        """Rules whose choices are right at every shape; what is wrong at one is not chosen there again."""
        while True:
            times.check_possible(self.measuring.state.notes)
            places = {shape.at(self.heads): met for shape, met in times.found.items()}
            steps = fit(places, defaults, times.default_first())
            for shape, met in times.found.items():
                taken = deciding(steps, shape.at(self.heads)).candidate
                if met.get(taken, math.inf) == math.inf:
                    raise PluginError(f"No few rules run every shape rightly, {shape} among them: nothing was written.")
                if self.measuring.error(shape, taken) > ALLOWED_ERROR[shape.op]:
                    met[taken] = math.inf
                    break
            else:
                return steps

    def _part(self, times: Times, defaults: Sequence[Candidate]) -> Part:
        steps, state, results = self._checked(times, defaults), self.measuring.state, []
        for shape, met in times.found.items():
            taken, before = deciding(steps, shape.at(self.heads)).candidate, state.before[shape]
            error, machines = state.errors[shape, taken], len(state.machines[shape])
            seconds = state.seconds[shape, taken]
            results.append(
                Result(shape, before, state.seconds[shape, before], taken, seconds, error, machines, dict(met))
            )
        return Part(tuple(steps), tuple(results), times.kept)


@dataclass
class Times:
    """Seconds by shape and candidate, infinite for what does not run or is wrong there."""

    found: dict[Shape, dict[Candidate, float]]
    before: dict[Shape, Candidate]
    kept: tuple[Candidate, ...]

    def default_first(self) -> list[Candidate]:
        """Every candidate; first what ran at most shapes before."""
        everywhere = [candidate for met in self.found.values() for candidate in met]
        ran = [self.before[shape] for shape in self.found]
        return sorted(dict.fromkeys(everywhere), key=lambda candidate: -ran.count(candidate))

    def without(self, names: set[Candidate]) -> Times:
        """The same as if these candidates were not there."""
        left = {
            shape: {one: took for one, took in met.items() if one not in names} for shape, met in self.found.items()
        }
        return Times(left, self.before, self.kept)

    def check_possible(self, notes: dict[tuple[Shape, Candidate], str]) -> None:
        """Raise PluginError where nothing that runs is right: that is a fault of the kernels, not of a tile."""
        for shape, met in self.found.items():
            if not any(math.isfinite(seconds) for seconds in met.values()):
                why = next((notes[shape, one] for one in met if (shape, one) in notes), "the output is wrong")
                raise PluginError(
                    f"Nothing that could run {shape} does so and gives the reference's output ({why}): nothing was "
                    "written; please report it."
                )


def _is_own(candidate: Candidate) -> bool:
    return not isinstance(candidate, PrefillWay) or candidate.runs == OWN
