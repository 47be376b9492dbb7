"""The search: which configs are measured, in which order, and which one wins.

The two products do not share tiles, only block_m, so their times add up: for each block_m the gate-up tiles are tried
with one down tile, then the down tiles with the best of them. What is tried follows from the estimates and from what
was measured, never from the clock, so a search that is taken up again goes the way it would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.kernels.moe.config import MoeConfig, config_object, parse_config

from .measuring import Machine, Measuring
from .problem import Problem
from .space import Candidates, Effort, candidates
from .state import Form, State

FORM: Form[int, MoeConfig] = Form("tokens", int, int, config_object, parse_config)


@dataclass(frozen=True)
class Winner:
    """What was found for so many tokens. Times in seconds; ``machines``: how many took part in measuring them."""

    tokens: int
    before: MoeConfig
    before_seconds: float
    config: MoeConfig
    seconds: float
    error: float
    machines: int


@dataclass(frozen=True)
class Search:
    """A search for one problem on one GPU; ``before``: what runs now, by number of tokens."""

    gpu: Gpu
    problem: Problem
    effort: Effort
    before: Callable[[int], MoeConfig]
    machine: Machine[int, MoeConfig]
    state: State[int, MoeConfig]

    def planned(self, tokens: int) -> int:
        """Measurements for so many tokens, at most."""
        return 1 + sum(found.count for found in candidates(self.gpu, self.problem, tokens, self.effort))

    def unmeasured(self, tokens: int) -> list[MoeConfig]:
        """Configs that launch the kernels of what is going to be measured for so many tokens.

        A product's kernel does not depend on the other's tile: until the best gate-up tile is known, down tiles come
        with one that is still to be measured. Of a tuning taken up in between a kernel or two may be missing or not
        be needed, as that best tile decides.
        """
        known = {config: seconds for (count, config), seconds in self.state.seconds.items() if count == tokens}
        configs = [self.state.before.get(tokens) or self.before(tokens)]
        for found in candidates(self.gpu, self.problem, tokens, self.effort):
            gate_up = _gate_up_first(found)
            beside = min(gate_up, key=lambda config: known.get(config, -1.0))
            configs += [*gate_up, *_down_next(found, beside)]
        return [config for config in dict.fromkeys(configs) if config not in known]

    def run(self, tokens: int, allowed_error: float, tick: Callable[[float], None] = lambda seconds: None) -> Winner:
        """The fastest config whose output is right; ``tick`` is told of each time, 0 for one that was known.

        Raises PluginError where none is: that is a fault of the kernels, not of a tile.
        """
        if tokens not in self.state.before:
            self.state.add("before", tokens, self.before(tokens))
        before = self.state.before[tokens]
        measuring = Measuring(self.machine, self.state, tick)
        before_seconds = measuring.seconds(tokens, before)
        for found in candidates(self.gpu, self.problem, tokens, self.effort):
            _try_tiles(measuring, tokens, found)
        tried = [(seconds, config) for (count, config), seconds in self.state.seconds.items() if count == tokens]
        tried = [pair for pair in tried if math.isfinite(pair[0])]
        if not tried:
            why = self.state.notes.get((tokens, before), "no reason was kept")
            raise PluginError(f"No config runs with {tokens} tokens ({why}): nothing was written.")
        for seconds, config in sorted(tried, key=lambda pair: (pair[0], repr(pair[1]))):
            error = measuring.error(tokens, config)
            if error <= allowed_error:
                machines = len(self.state.machines[tokens])
                return Winner(tokens, before, before_seconds, config, seconds, error, machines)
        raise PluginError(
            f"No config for {tokens} tokens gives the reference's output (relative error at most {allowed_error:g}): "
            f"nothing was written; the errors are in {self.state.path}, please report them."
        )


def _try_tiles(measuring: Measuring[int, MoeConfig], tokens: int, found: Candidates) -> None:
    best = min(_gate_up_first(found), key=lambda config: measuring.seconds(tokens, config))
    for config in _down_next(found, best):
        measuring.seconds(tokens, config)


def _gate_up_first(found: Candidates) -> list[MoeConfig]:
    return [MoeConfig(found.block_m, tile, found.down[0]) for tile in found.gate_up]


def _down_next(found: Candidates, best: MoeConfig) -> list[MoeConfig]:
    return [MoeConfig(found.block_m, best.gate_up, tile) for tile in found.down[1:]]
