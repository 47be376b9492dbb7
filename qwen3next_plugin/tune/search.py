"""The search: which configs are measured, in which order, and which one wins.

The two products do not share tiles, only block_m, so their times add up: for each block_m the gate-up tiles are tried
with one down tile, then the down tiles with the best of them. What is tried follows from the estimates and from what
was measured, never from the clock, so a search that is taken up again goes the way it would have gone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.kernels.moe.config import MoeConfig

from .problem import Problem
from .space import Candidates, Effort, candidates
from .state import State


class TrialError(Exception):
    """A config that the GPU or the compiler refuses; the next one can be tried."""


class GpuLostError(Exception):
    """The GPU failed while it ran a config, and runs nothing more in this process."""


class Machine(Protocol):
    """Runs configs. Both methods may raise TrialError and GpuLostError."""

    def seconds(self, tokens: int, config: MoeConfig) -> float:
        """The time of one `fused_moe` with `tokens` tokens, weights coming from memory."""

    def error(self, tokens: int, config: MoeConfig) -> float:
        """The relative error of its output against the reference, infinite if it is not finite."""


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
    machine: Machine
    state: State

    def planned(self, tokens: int) -> int:
        """Measurements for so many tokens, at most."""
        return 1 + sum(found.count for found in candidates(self.gpu, self.problem, tokens, self.effort))

    def run(self, tokens: int, allowed_error: float, tick: Callable[[float], None] = lambda seconds: None) -> Winner:
        """The fastest config whose output is right; ``tick`` is told of each time, 0 for one that was known.

        Raises PluginError where none is: that is a fault of the kernels, not of a tile.
        """
        if tokens not in self.state.before:
            self.state.add("before", tokens, self.before(tokens))
        before = self.state.before[tokens]
        before_seconds = self._seconds(tokens, before, tick)
        for found in candidates(self.gpu, self.problem, tokens, self.effort):
            self._try_tiles(tokens, found, tick)
        tried = [(seconds, config) for (count, config), seconds in self.state.seconds.items() if count == tokens]
        tried = [pair for pair in tried if math.isfinite(pair[0])]
        if not tried:
            why = self.state.notes.get((tokens, before), "no reason was kept")
            raise PluginError(f"No config runs with {tokens} tokens ({why}): nothing was written.")
        for seconds, config in sorted(tried, key=lambda pair: (pair[0], repr(pair[1]))):
            error = self._error(tokens, config)
            if error <= allowed_error:
                machines = len(self.state.machines[tokens])
                return Winner(tokens, before, before_seconds, config, seconds, error, machines)
        raise PluginError(
            f"No config for {tokens} tokens gives the reference's output (relative error at most {allowed_error:g}): "
            f"nothing was written; the errors are in {self.state.path}, please report them."
        )

    def _try_tiles(self, tokens: int, found: Candidates, tick: Callable[[float], None]) -> None:
        first_down = found.down[0]
        configs = [MoeConfig(found.block_m, tile, first_down) for tile in found.gate_up]
        best = min(configs, key=lambda config: self._seconds(tokens, config, tick))
        for tile in found.down[1:]:
            self._seconds(tokens, MoeConfig(found.block_m, best.gate_up, tile), tick)

    def _seconds(self, tokens: int, config: MoeConfig, tick: Callable[[float], None]) -> float:
        known = self.state.seconds.get((tokens, config))
        value = self._ask("seconds", self.machine.seconds, tokens, config) if known is None else known
        tick(value if known is None else 0.0)
        return value

    def _error(self, tokens: int, config: MoeConfig) -> float:
        known = self.state.errors.get((tokens, config))
        return self._ask("error", self.machine.error, tokens, config) if known is None else known

    def _ask(self, what: str, question: Callable[[int, MoeConfig], float], tokens: int, config: MoeConfig) -> float:
        note = ""
        try:
            value = question(tokens, config)
        except TrialError as refused:
            value, note = math.inf, str(refused)
        except GpuLostError as lost:
            self.state.add(what, tokens, config, math.inf, str(lost))
            raise PluginError(
                f"The GPU failed at one config ({lost}), which is left out from now on: run the same command again, "
                "it goes on with the next one."
            ) from None
        if math.isnan(value):
            value = math.inf
        self.state.add(what, tokens, config, value, note)
        return value
