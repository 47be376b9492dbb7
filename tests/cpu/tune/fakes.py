"""A GPU that answers at once, and what a tuning needs beside it."""

import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from qwen3next_plugin.kernels.gpus import KNOWN, Gpu
from qwen3next_plugin.kernels.moe.config import MoeConfig
from qwen3next_plugin.tune.model import config_seconds
from qwen3next_plugin.tune.problem import Problem
from qwen3next_plugin.tune.run import tune
from qwen3next_plugin.tune.search import Winner
from qwen3next_plugin.tune.session import About, Place

H200 = KNOWN["h200"]
PUBLISHED = Problem(512, 512, 10, 2048, 512, "fp8")
SMALL = Problem(4, 4, 2, 64, 64, "bf16")
ABOUT = About({"torch": "2.13", "triton": "3.7", "kernels": "abc"}, "machine one")


class Killed(BaseException):
    """What a kill does: nothing catches it."""


class FakeMachine:
    """Times by the model, each off by up to `noise` of it, the same whenever it is asked; every answer is counted.

    Dies after `lives` answers. Configs for which `wrong` is true give wrong output, those for which `refuses` gives an
    exception do not run. ``called``: what is compiled ahead, where that is done at all.
    """

    def __init__(
        self,
        problem: Problem,
        gpu: Gpu = H200,
        noise: float = 0.0,
        lives: float = math.inf,
        wrong: Callable[[MoeConfig], bool] = lambda config: False,
        refuses: Callable[[MoeConfig], Exception | None] = lambda config: None,
    ) -> None:
        self.problem, self.gpu, self.noise, self.lives = problem, gpu, noise, lives
        self.wrong, self.refuses = wrong, refuses
        self.answered: list[tuple[str, int, MoeConfig]] = []
        self.called: list[tuple[int, MoeConfig]] = []

    def once(self, tokens: int, config: MoeConfig) -> Callable[[], object]:
        return partial(self.called.append, (tokens, config))

    def _answer(self, what: str, tokens: int, config: MoeConfig) -> None:
        if len(self.answered) >= self.lives:
            raise Killed
        refusal = self.refuses(config)
        if refusal is not None:
            raise refusal
        self.answered.append((what, tokens, config))

    def seconds(self, tokens: int, config: MoeConfig) -> float:
        self._answer("seconds", tokens, config)
        return seconds_of(self.gpu, self.problem, tokens, config, self.noise)

    def error(self, tokens: int, config: MoeConfig) -> float:
        self._answer("error", tokens, config)
        return 0.9 if self.wrong(config) else 1e-3


def seconds_of(gpu: Gpu, problem: Problem, tokens: int, config: MoeConfig, noise: float) -> float:
    """The model's estimate (0.1 s for what it rules out) times a factor that hangs on the config alone."""
    estimate = config_seconds(gpu, problem, tokens, config)
    chance = zlib.crc32(repr((tokens, config)).encode()) / 2**32
    return (estimate if math.isfinite(estimate) else 0.1) * (1 + noise * (2 * chance - 1))


def run(
    folder: Path,
    machine: FakeMachine,
    tokens: tuple[int, ...] = (1, 64, 2048),
    effort: str = "default",
    about: About = ABOUT,
    state: Path | None = None,
) -> tuple[Path, list[Winner]]:
    """A whole tuning with files in `folder`, without a word."""
    place, console = Place(folder, state), Console(quiet=True)
    return tune(machine.gpu, machine.problem, effort, tokens, place, about, lambda: machine, console)
