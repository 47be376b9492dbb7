"""What is measured: shapes, and for each operation what could run them."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.gdn.config import decode_tile, prefill_rules, verify_tile
from qwen3next_plugin.kernels.gdn.config_file import parse_tile, parse_way, way_object
from qwen3next_plugin.kernels.gdn.table import (
    MERGING,
    OWN,
    PROJECTED,
    DecodeTile,
    GdnTable,
    OwnPrefill,
    PrefillWay,
    VerifyTile,
)
from qwen3next_plugin.spec import Qwen3NextSpec

from ..state import Form

Operation = Literal["prefill", "decode", "verify"]
Candidate = PrefillWay | DecodeTile | VerifyTile

_STATES = {4: "float32", 2: "bfloat16"}


@dataclass(frozen=True)
class Heads:
    """Key and value heads of one rank."""

    keys: int
    values: int

    def __str__(self) -> str:
        return f"{self.keys}/{self.values}"


def heads_of(spec: Qwen3NextSpec, tp: int, text: str | None) -> Heads:
    """One of ``tp`` ranks' heads, or those of ``text``, as in 16/32. Raises SettingsError where there are none."""
    keys, values = spec.gdn.num_k_heads, spec.gdn.num_v_heads
    if text is None:
        if keys % tp or values % tp:
            raise SettingsError(
                f"--tp: size {tp} does not divide the {keys} key and {values} value heads of the model."
            )
        return Heads(keys // tp, values // tp)
    if tp != 1:
        raise SettingsError("--tp and --heads both say how many heads a GPU has: give one of the two.")
    found = re.fullmatch(r"([1-9]\d*)/([1-9]\d*)", text)
    if found is None or int(found[2]) % int(found[1]):
        raise SettingsError(f"--heads: {text!r} is no number of key and a multiple of it of value heads, as 16/32 is.")
    return Heads(int(found[1]), int(found[2]))


@dataclass(frozen=True)
class Shape:
    """``rows`` requests with ``tokens`` tokens each, and the bytes of an element of their states.

    As text ``verify 64x4, float32 states``: rows, tokens a row, states.
    """

    op: Operation
    rows: int
    tokens: int = 1
    state_bytes: int = 4

    def __str__(self) -> str:
        states = "" if self.op == "prefill" else f", {_STATES[self.state_bytes]} states"
        return f"{self.op} {self.rows}x{self.tokens}{states}"

    def at(self, heads: Heads) -> tuple[int, ...]:
        """Where it lies for a rule: tokens and tokens a row of a prefill, else programs."""
        if self.op == "prefill":
            return self.rows * self.tokens, self.tokens
        return (self.rows * (heads.keys if self.op == "decode" else heads.values),)


@dataclass(frozen=True)
class Group:
    """Shapes that one part of the table decides on. Candidates meet the scouts, and only the better ones the rest."""

    shapes: tuple[Shape, ...]
    scouts: tuple[Shape, ...]


@dataclass(frozen=True)
class Effort:
    """How much is measured.

    prompts and scouts: (rows, tokens) of prefills; batches, verified: rows of decodes and verifications; drafts: tokens
    a row of the latter; slack: who takes more times the best one's time at every scout is left out elsewhere; chunks,
    stages: the variants of our own prefill; decode, verify: their tiles.
    """

    prompts: tuple[tuple[int, int], ...]
    scouts: tuple[tuple[int, int], ...]
    batches: tuple[int, ...]
    verified: tuple[int, ...]
    drafts: tuple[int, ...]
    slack: float
    chunks: tuple[OwnPrefill, ...]
    stages: tuple[int, ...]
    decode: tuple[DecodeTile, ...]
    verify: tuple[VerifyTile, ...]


_MERGING = OwnPrefill(MERGING, 4, 168, 3)
_CHUNKS = (OwnPrefill("doubling"), OwnPrefill("blocks"), _MERGING)
_DECODE = (
    DecodeTile(None, 16), DecodeTile(2048, 2), DecodeTile(1024, 2), DecodeTile(1024, 2, 3),
    DecodeTile(2048, 4), DecodeTile(1024, 2, 5),
)  # fmt: skip
_VERIFY = (
    VerifyTile(128, 16), VerifyTile(128, 8), VerifyTile(128, 4, PROJECTED),
    VerifyTile(64, 8), VerifyTile(64, 4), VerifyTile(64, 4, PROJECTED),
)  # fmt: skip
_QUICK = Effort(
    prompts=((1, 512), (1, 2048), (1, 8192), (8, 1024), (64, 256)),
    scouts=((1, 2048), (8, 1024)),
    batches=(1, 16, 64, 256),
    verified=(1, 16, 64),
    drafts=(2, 4),
    slack=1.1,
    chunks=_CHUNKS,
    stages=(2, 3),
    decode=_DECODE[:4],
    verify=_VERIFY[:3],
)
_DEFAULT = replace(
    _QUICK,
    prompts=(
        (1, 512), (1, 2048), (1, 4096), (1, 8192), (1, 32768), (4, 8192), (8, 1024), (64, 256), (256, 64),
    ),
    batches=(1, 2, 4, 8, 16, 32, 64, 128, 256),
    verified=(1, 4, 16, 64, 256),
    slack=1.2,
    stages=(2, 3, 1),
    decode=_DECODE,
    verify=_VERIFY,
)  # fmt: skip
_THOROUGH = replace(
    _DEFAULT,
    prompts=((1, 128), (1, 1024), *_DEFAULT.prompts, (16, 128), (32, 2048)),
    drafts=(2, 3, 4, 8),
    slack=2.0,
    chunks=(*_CHUNKS, OwnPrefill("blocks", 4, 168), OwnPrefill("blocks", 8), replace(_MERGING, chunk_registers=None)),
    decode=(
        *_DECODE, DecodeTile(None, 8), DecodeTile(512, 1), DecodeTile(1024, 1), DecodeTile(4096, 4),
        DecodeTile(2048, 4, 3),
    ),
    verify=(*_VERIFY, VerifyTile(64, 16), VerifyTile(32, 4), VerifyTile(16, 2), VerifyTile(128, 8, PROJECTED)),
)  # fmt: skip
EFFORTS = {"quick": _QUICK, "default": _DEFAULT, "thorough": _THOROUGH}
_TILED = (9, 0)  # elsewhere the walk of the kernels over tiles has too little shared memory, or was never compiled


def effort_for(name: str, capability: tuple[int, int]) -> Effort:
    """The effort of that name, with what GPUs of that compute capability may run."""
    effort = EFFORTS[name]
    if capability == _TILED:
        return effort
    return replace(effort, chunks=tuple(own for own in effort.chunks if own.inverse != MERGING))


def prefills(effort: Effort) -> Group:
    """Prompts; their states are float32, which the kernels read and write once whatever the type."""
    return Group(*(tuple(Shape("prefill", *sizes) for sizes in chosen) for chosen in (effort.prompts, effort.scouts)))


def decodes(effort: Effort, state_bytes: int) -> Group:
    """Batches of one token a row; the smallest and one that fills a GPU are its scouts."""
    return _batches(effort.batches, Shape("decode", 1, 1, state_bytes))


def verifications(effort: Effort, tokens: int, state_bytes: int) -> Group:
    """Batches of so many tokens a row."""
    return _batches(effort.verified, Shape("verify", 1, tokens, state_bytes))


def _batches(rows: tuple[int, ...], one: Shape) -> Group:
    shapes = tuple(replace(one, rows=count) for count in rows)
    full = next((shape for shape in shapes if shape.rows >= 64), shapes[-1])
    return Group(shapes, tuple(dict.fromkeys((shapes[0], full))))


def chosen_by(table: GdnTable, shape: Shape, heads: Heads, peers: tuple[str, ...]) -> Candidate:
    """What the table takes for the shape where an engine has these ``peers``."""
    (first, *_) = shape.at(heads)
    if shape.op == "decode":
        return decode_tile(table, shape.state_bytes, first)
    if shape.op == "verify":
        return verify_tile(table, shape.state_bytes, shape.tokens, first)
    ways = (rule.way for rule in prefill_rules(table, first, shape.rows))
    return next(way for way in ways if way.runs == OWN or way.runs in peers)


def _candidate_object(candidate: Candidate) -> dict[str, Any]:
    return way_object(candidate) if isinstance(candidate, PrefillWay) else asdict(candidate)


def _parse_candidate(one: dict[str, Any]) -> Candidate:
    if "runs" in one:
        return parse_way(one)
    found: Candidate = parse_tile(DecodeTile if "elements" in one else VerifyTile, one)
    return found


def _parse_shape(one: dict[str, Any]) -> Shape:
    return Shape(**one)


FORM: Form[Shape, Candidate] = Form("shape", asdict, _parse_shape, _candidate_object, _parse_candidate)
