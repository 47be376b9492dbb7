"""One measurement at a time, each written down before the next one begins; what is known is not measured again."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Generic, Protocol, TypeVar

from qwen3next_plugin.errors import PluginError

from .state import C, P, State

PlaceT = TypeVar("PlaceT", contravariant=True)
ConfigT = TypeVar("ConfigT", contravariant=True)


class TrialError(Exception):
    """A config that the GPU or the compiler refuses; the next one can be tried."""


class GpuLostError(Exception):
    """The GPU failed while it ran a config, and runs nothing more in this process."""


def in_short(error: Exception) -> str:
    """For a sentence."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"


class Machine(Protocol[PlaceT, ConfigT]):
    """Runs configs. `seconds` and `error` may raise TrialError and GpuLostError, `once` anything."""

    def once(self, place: PlaceT, config: ConfigT, /) -> Callable[[], object]:
        """One call with inputs that `seconds` times; not run it compiles what `seconds` launches, see `ahead`."""

    def seconds(self, place: PlaceT, config: ConfigT, /) -> float:
        """The time of one call there, its inputs coming from memory."""

    def error(self, place: PlaceT, config: ConfigT, /) -> float:
        """The relative error of its output against the reference, infinite if it is not finite."""


class Measuring(Generic[P, C]):
    """Asks ``state``, then ``machine``; ``tick`` is told of each time, 0 for one that was known."""

    def __init__(
        self, machine: Machine[P, C], state: State[P, C], tick: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.machine, self.state, self.tick = machine, state, tick

    def seconds(self, place: P, config: C) -> float:
        """Infinite for a config that does not run. Raises PluginError where it fells the GPU."""
        known = self.state.seconds.get((place, config))
        value = self._ask("seconds", self.machine.seconds, place, config) if known is None else known
        self.tick(value if known is None else 0.0)
        return value

    def error(self, place: P, config: C) -> float:
        """Likewise."""
        known = self.state.errors.get((place, config))
        return self._ask("error", self.machine.error, place, config) if known is None else known

    def _ask(self, what: str, question: Callable[[P, C], float], place: P, config: C) -> float:
        note = ""
        try:
            value = question(place, config)
        except TrialError as refused:
            value, note = math.inf, str(refused)
        except GpuLostError as lost:
            self.state.add(what, place, config, math.inf, str(lost))
            raise PluginError(
                f"The GPU failed at one config ({lost}), which is left out from now on: run the same command again, "
                "it goes on with the next one."
            ) from None
        if math.isnan(value):
            value = math.inf
        self.state.add(what, place, config, value, note)
        return value
