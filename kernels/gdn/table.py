"""The choices that a file for a GPU makes, as data."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from ..offers import OWN

RUNNERS = (OWN, "flashinfer", "fla")
MERGING = "merging"
INVERSES = ("doubling", "blocks", MERGING)
STEPS, PROJECTED = "steps", "projected"
FORMS = (STEPS, PROJECTED)
LEAST_ROWS = 16
"""Rows and columns of a state that a matrix instruction takes at least, as "projected" does."""

Source = Literal["prediction", "measured"]


@dataclass(frozen=True)
class OwnPrefill:
    """How our prefill kernels are built.

    inverse: of the chunk's triangular system (:mod:`.triton_inverse`), "doubling" or "blocks" in the two kernels of
    :mod:`.triton_prefill`, or "merging", which means the three of :mod:`.triton_tiled`; those take bfloat16 tokens and
    heads of 64 or 128 only, and all others run as ``OwnPrefill()``. chunk_warps and chunk_registers (None: as many as
    it takes): of the kernel with the inverse; walk_stages: of the pipeline of the one that walks, where products are
    bfloat16.
    """

    inverse: str = INVERSES[0]
    chunk_warps: int = 4
    chunk_registers: int | None = None
    walk_stages: int = 2


@dataclass(frozen=True)
class PrefillWay:
    """Who runs a prefill: "own" with what it is built like, or one of an engine's functions."""

    runs: str
    own: OwnPrefill | None = None


@dataclass(frozen=True)
class PrefillRule:
    """``way`` for prefills of at least ``min_tokens`` tokens, ``min_mean`` a row. The first that fits and is there."""

    way: PrefillWay
    min_tokens: int
    min_mean: int
    why: str

    @property
    def peer(self) -> str:
        """Who runs."""
        return self.way.runs


@dataclass(frozen=True)
class DecodeTile:
    """Elements of a state that a program holds at a time, None: all of a head's; and the program's warps.

    A head that is no larger than that is held whole, by fewer warps where it is smaller than 1,024 elements a warp.
    num_stages: 1, the next tile is asked for into registers; more, the next ones on their way through shared memory.
    """

    elements: int | None
    num_warps: int
    num_stages: int = 1


@dataclass(frozen=True)
class DecodeRule:
    """``tile`` for states of so many bytes an element from so many programs (rows times key heads) on."""

    state_bytes: int
    min_programs: int
    tile: DecodeTile
    why: str


@dataclass(frozen=True)
class VerifyTile:
    """Rows of a head's state that a program goes through at a time, its warps, and which kernel it is.

    form: "steps" takes the state from token to token, "projected" reads it once for all of them, 16 rows at a time or
    more. Their sums differ in their order.
    """

    rows: int
    num_warps: int
    form: str = STEPS


@dataclass(frozen=True)
class VerifyRule:
    """``tile`` for rows of up to ``max_tokens`` tokens from so many programs (rows times value heads) on."""

    state_bytes: int
    max_tokens: int
    min_programs: int
    tile: VerifyTile
    why: str


@dataclass(frozen=True)
class StatesTile:
    """Rows of a head's state that a program goes through at a time, and its warps."""

    rows: int
    num_warps: int


@dataclass(frozen=True)
class StatesRule:
    """``tile`` for verifications that leave a state a token, of rows of up to ``max_tokens`` tokens, in one launch.

    From so many programs (rows times value heads) on; where no rule fits, one operation runs after another.
    """

    state_bytes: int
    max_tokens: int
    min_programs: int
    tile: StatesTile
    why: str


@dataclass(frozen=True)
class GdnTable:
    """One file: where it is from, and its rules. The last of ``prefill`` is our own kernels', for every shape."""

    source: Source
    prefill: tuple[PrefillRule, ...]
    decode: tuple[DecodeRule, ...]
    verify: tuple[VerifyRule, ...]
    states: tuple[StatesRule, ...] = ()
