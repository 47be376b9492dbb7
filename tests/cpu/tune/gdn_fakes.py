"""A GPU that answers at once for Gated DeltaNet's kernels, and a whole tuning on it."""

import math
import zlib
from collections.abc import Callable
from functools import partial
from pathlib import Path

from rich.console import Console

from qwen3next_plugin.kernels.gdn.table import OWN, PROJECTED, DecodeTile, OwnPrefill, PrefillWay, VerifyTile
from qwen3next_plugin.tune.gdn.run import tune_gdn
from qwen3next_plugin.tune.gdn.search import Part
from qwen3next_plugin.tune.gdn.space import Candidate, Heads, Shape
from qwen3next_plugin.tune.session import About, Place
from tests.cpu.tune.fakes import H200, Killed

HEADS = Heads(16, 32)
ABOUT = About({"torch": "2.13", "triton": "3.7", "kernels": "abc"}, "machine one", "2026-11-27")
FLASHINFER, FLA = PrefillWay("flashinfer"), PrefillWay("fla")
DOUBLING, BLOCKS = PrefillWay(OWN, OwnPrefill()), PrefillWay(OWN, OwnPrefill("blocks"))
MERGING = PrefillWay(OWN, OwnPrefill("merging", 4, 168, 3))

Seconds = Callable[[Shape, Candidate], float]


def usual(shape: Shape, candidate: Candidate) -> float:
    """Peers cost a call and a row something, and save time on tokens; small tiles cost few programs and save many."""
    tokens = shape.rows * shape.tokens
    if isinstance(candidate, PrefillWay):
        if candidate.own is None:
            call, row, token = (90e-6, 2e-6, 30e-9) if candidate == FLASHINFER else (300e-6, 2e-6, 50e-9)
            return call + row * shape.rows + token * tokens
        own = candidate.own
        slower = 1.0 if own.inverse == "blocks" else 1.2
        slower *= {2: 1.0, 3: 0.9}.get(own.walk_stages, 1.3)
        return 40e-6 + slower * (80e-9 if own.chunk_warps == 4 else 100e-9) * tokens
    if isinstance(candidate, DecodeTile):
        if candidate.elements is None:
            return 12e-6 + 2e-6 * shape.rows
        best = 2048 if shape.state_bytes == 4 else 1024
        return 20e-6 + (1.5e-6 if candidate == DecodeTile(best, 2) else 1.7e-6) * shape.rows
    if candidate == VerifyTile(128, 16):
        return 15e-6 + 4e-6 * shape.rows
    if candidate == VerifyTile(128, 4, PROJECTED):
        return 20e-6 + (1.6e-6 if shape.tokens > 2 or shape.state_bytes == 2 else 3.5e-6) * shape.rows
    return 25e-6 + (2.5e-6 if candidate == VerifyTile(128, 8) else 2.8e-6) * shape.rows


class FakeGdnMachine:
    """Times by ``times``, each off by up to ``noise`` of it, the same whenever it is asked; every answer is counted.

    Dies after ``lives`` answers. What is ``wrong`` gives wrong output, what ``refuses`` an exception does not run.
    ``called``: what is compiled ahead, where that is done at all.
    """

    def __init__(
        self,
        times: Seconds = usual,
        noise: float = 0.0,
        lives: float = math.inf,
        peers: tuple[str, ...] = ("fla", "flashinfer"),
        wrong: Callable[[Shape, Candidate], bool] = lambda shape, candidate: False,
        refuses: Callable[[Shape, Candidate], Exception | None] = lambda shape, candidate: None,
    ) -> None:
        self.times, self.noise, self.lives, self.peers = times, noise, lives, peers
        self.missing = {name: "not in this engine" for name in ("fla", "flashinfer") if name not in peers}
        self.wrong, self.refuses = wrong, refuses
        self.answered: list[tuple[str, Shape, Candidate]] = []
        self.called: list[tuple[Shape, Candidate]] = []

    def once(self, shape: Shape, candidate: Candidate) -> Callable[[], object]:
        return partial(self.called.append, (shape, candidate))

    def _answer(self, what: str, shape: Shape, candidate: Candidate) -> None:
        if len(self.answered) >= self.lives:
            raise Killed
        refusal = self.refuses(shape, candidate)
        if refusal is not None:
            raise refusal
        self.answered.append((what, shape, candidate))

    def seconds(self, shape: Shape, candidate: Candidate) -> float:
        self._answer("seconds", shape, candidate)
        chance = zlib.crc32(repr((shape, candidate)).encode()) / 2**32
        return self.times(shape, candidate) * (1 + self.noise * (2 * chance - 1))

    def error(self, shape: Shape, candidate: Candidate) -> float:
        self._answer("error", shape, candidate)
        return 0.9 if self.wrong(shape, candidate) else 1e-3


def run(
    folder: Path,
    machine: FakeGdnMachine,
    effort: str = "default",
    about: About = ABOUT,
    state: Path | None = None,
    heads: Heads = HEADS,
) -> tuple[Path, list[Part]]:
    """A whole tuning with files in ``folder``, without a word."""
    place, console = Place(folder, state), Console(quiet=True)
    return tune_gdn(H200, heads, "vllm", effort, place, about, lambda: machine, console)
