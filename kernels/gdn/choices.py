"""What the table of operations says of Gated DeltaNet's: who runs a prefill, which tiles there are, and why."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from ..dispatch import Choice
from ..gpus import Target
from . import peers
from .config import COMMAND, find, is_users
from .table import MERGING, PROJECTED, DecodeTile, PrefillRule, PrefillWay, StatesTile, VerifyTile

_STATES = {4: "float32", 2: "16-bit"}


def prefill_choices(target: Target) -> list[Choice]:
    """Our own kernels, who takes over where, and what is missing."""
    rules = find(target).table.prefill
    offers = peers.OFFERS.choices(rules, partial(_ranges_of, rules))
    own = _own_choices(rules, _origin(target))
    return [*own, *(replace(offer, details=_whys_of(rules, offer.runs)) for offer in offers)]


def decode_choices(target: Target) -> list[Choice]:
    """One launch, and the tile for each number of programs."""
    rules = find(target).table.decode
    details = tuple(
        f"{_STATES[rule.state_bytes]} states, from {rule.min_programs} programs on: {tile_text(rule.tile)} ({rule.why})"
        for rule in rules
    )
    why = "with convolution and norm, one launch"
    return [Choice("a step that only decodes", why=why, tiles=_origin(target), details=details)]


def verify_choices(target: Target) -> list[Choice]:
    """Likewise, by tokens a row."""
    details = tuple(
        f"{_STATES[rule.state_bytes]} states, up to {rule.max_tokens} tokens a row, from {rule.min_programs} programs "
        f"on: {tile_text(rule.tile)} ({rule.why})"
        for rule in find(target).table.verify
    )
    why = "with convolution and norm, one launch"
    return [Choice("drafts that leave records", why=why, tiles=_origin(target), details=details)]


def states_choices(target: Target) -> list[Choice]:
    """Likewise, of drafts that leave a state a token; nowhere without rules."""
    rules = find(target).table.states
    if not rules:
        return [Choice("drafts that leave a state each: nowhere", why="not measured on such a GPU")]
    details = tuple(
        f"{_STATES[rule.state_bytes]} states, up to {rule.max_tokens} tokens a row, from {rule.min_programs} programs "
        f"on: {tile_text(rule.tile)} ({rule.why})"
        for rule in rules
    )
    shapes = f"drafts that leave a state each, from {min(rule.min_programs for rule in rules)} programs on"
    return [Choice(shapes, why="with convolution and norm, one launch", tiles=_origin(target), details=details)]


def way_text(way: PrefillWay) -> str:
    """``own, inverse by doubling, 4 warps, 2 stages``, or an engine's function's name."""
    if way.own is None:
        return way.runs
    registers = "" if way.own.chunk_registers is None else f", {way.own.chunk_registers} registers"
    return f"own, inverse by {way.own.inverse}, {way.own.chunk_warps} warps{registers}, {way.own.walk_stages} stages"


def tile_text(tile: DecodeTile | VerifyTile | StatesTile) -> str:
    """``1024 elements, 2 warps, 3 stages``; ``all tokens at once, 128 rows, 4 warps`` or ``token by token, ..``."""
    if isinstance(tile, StatesTile):
        return f"token by token, {tile.rows} rows, {tile.num_warps} warps"
    if isinstance(tile, VerifyTile):
        form = "all tokens at once" if tile.form == PROJECTED else "token by token"
        return f"{form}, {tile.rows} rows, {tile.num_warps} warps"
    held = "a whole state" if tile.elements is None else f"{tile.elements} elements"
    stages = "" if tile.num_stages == 1 else f", {tile.num_stages} stages"
    return f"{held}, {tile.num_warps} warps{stages}"


def _own_choices(rules: Sequence[PrefillRule], origin: str) -> list[Choice]:
    """Our own kernels by types and heads: those over tiles, which a rule can name, take few of them."""
    own = [(rule, rule.way.own) for rule in rules if rule.way.own is not None]
    details = tuple(f"{_range(rule)}: {way_text(rule.way)} ({rule.why})" for rule, _ in own)
    merging = [built.inverse == MERGING for _, built in own]
    way = ", chunks of 64, products in bfloat16"
    others = Choice(
        "other types and heads", why="two kernels, chunks of 64, products in TF32, split in three but for float16"
    )
    if not any(merging):
        return [
            Choice(
                "bfloat16 tokens, heads of a multiple of 64", why=f"two kernels{way}", tiles=origin, details=details
            ),
            others,
        ]
    tiled = "three kernels over tiles" + ("" if all(merging) else " where the inverse is by merging, else two")
    return [
        Choice(
            "bfloat16 tokens, heads of 64 or 128",
            why=tiled + way,
            tiles=origin,
            details=details,
        ),
        Choice("bfloat16 tokens, heads of another multiple of 64", why=f"two kernels{way}"),
        others,
    ]


def _origin(target: Target) -> str:
    found = find(target)
    if found.path is None:
        return ""
    name = f"{found.path.parent.name}/{found.path.name}"
    if found.table.source == "measured":
        return f"{name}, measured{' by you' if is_users(found.path) else ''}"
    return f"{name}, in part predictions; `{COMMAND}` measures"


def _range(rule: PrefillRule) -> str:
    if not rule.min_tokens and not rule.min_mean:
        return "from the first token on"
    return f"from {rule.min_tokens} tokens on, {rule.min_mean} a row"


def _ranges_of(rules: Sequence[PrefillRule], name: str) -> str:
    kept = [snapshots for _, snapshots in peers.OFFERS.shapes_of(name)]
    less = ", not where snapshots are kept" if kept and True not in kept else ""
    if peers.OFFERS.wanted == name:
        return f"wherever it can, as asked{less}"
    return (" or ".join(_range(rule) for rule in rules if rule.peer == name) or "nowhere") + less


def _whys_of(rules: Sequence[PrefillRule], name: str) -> tuple[str, ...]:
    return tuple(rule.why for rule in rules if rule.peer == name)
