"""Files of :class:`.table.GdnTable`: JSON, one line a rule."""

import functools
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .table import (
    FORMS,
    INVERSES,
    LEAST_ROWS,
    OWN,
    PROJECTED,
    RUNNERS,
    DecodeRule,
    DecodeTile,
    GdnTable,
    OwnPrefill,
    PrefillRule,
    PrefillWay,
    StatesRule,
    StatesTile,
    VerifyRule,
    VerifyTile,
)

FORMAT = 1
STATE_BYTES = (4, 2)
_MOST_REGISTERS = 255  # that a thread of any GPU can have
_MOST_STAGED = 1 << 14  # elements, 64 KiB of float32: every GPU from sm_80 on has that much shared memory for a program


@functools.lru_cache
def read_file(path: Path) -> GdnTable:
    """The file's table. Raises ValueError, one sentence that names the file, for one that means nothing."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["source"] not in ("prediction", "measured"):
            raise ValueError(f"format {content['format']} from {content['source']!r}")
        return checked(
            GdnTable(
                content["source"],
                tuple(map(_prefill_rule, content["prefill"])),
                tuple(
                    DecodeRule(one["state_bytes"], one["min_programs"], parse_tile(DecodeTile, one), _text(one, "why"))
                    for one in content["decode"]
                ),
                tuple(VerifyRule(*_rows_of_drafts(VerifyTile, one)) for one in content["verify"]),
                # which files of before there were such rules lack
                tuple(StatesRule(*_rows_of_drafts(StatesTile, one)) for one in content.get("states", ())),
            )
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = " ".join(str(error).split())
        raise ValueError(
            f"{path} is not a table of Gated DeltaNet's kernels of format {FORMAT} ({type(error).__name__}: {said}): "
            "write it anew with `qwen3next tune gdn`, or take it away"
        ) from None


def rule_object(rule: PrefillRule | DecodeRule | VerifyRule | StatesRule) -> dict[str, Any]:
    """As JSON holds it: one object without others inside, the reason last."""
    flat = asdict(rule)
    why = flat.pop("why")
    if isinstance(rule, PrefillRule):
        flat.pop("way")
        return {"runs": rule.way.runs, **flat, **_own_object(rule.way), "why": why}
    tile = flat.pop("tile")
    return {**flat, **tile, "why": why}


def way_object(way: PrefillWay) -> dict[str, Any]:
    """As JSON holds it; `parse_way` reads it back."""
    return {"runs": way.runs, **_own_object(way)}


def parse_way(one: dict[str, Any]) -> PrefillWay:
    """Raises KeyError, TypeError or ValueError for anything else."""
    runs = one["runs"]
    if runs not in RUNNERS:
        raise ValueError(f"runs is {runs!r}, which is none of {', '.join(RUNNERS)}")
    if runs != OWN:
        return PrefillWay(runs)
    own = OwnPrefill(one["inverse"], one["chunk_warps"], one["chunk_registers"], one["walk_stages"])
    if own.inverse not in INVERSES:
        raise ValueError(f"inverse is {own.inverse!r}, which is none of {', '.join(INVERSES)}")
    _power("chunk_warps", own.chunk_warps, 16)
    _number("walk_stages", own.walk_stages, 1, 8)
    if own.chunk_registers is not None:
        _number("chunk_registers", own.chunk_registers, 32, _MOST_REGISTERS)
    return PrefillWay(OWN, own)


def parse_tile(kind: type[Any], one: dict[str, Any]) -> Any:
    """A DecodeTile, VerifyTile or StatesTile, whichever ``kind`` is.

    Raises KeyError, TypeError or ValueError for anything else.
    """
    _power("num_warps", one["num_warps"], 16)
    if kind is DecodeTile:
        if one["elements"] is not None:
            _power("elements", one["elements"], 1 << 16)
        stages = one.get("num_stages", 1)  # which files of before there were stages lack
        _number("num_stages", stages, 1, 8)
        if stages > 1 and (one["elements"] is None or one["elements"] * stages > _MOST_STAGED):
            raise ValueError(
                f"num_stages is {stages} for {one['elements']} elements: stages are of tiles, and together they hold "
                f"{_MOST_STAGED} elements at most"
            )
        return DecodeTile(one["elements"], one["num_warps"], stages)
    if kind is StatesTile:
        _power("rows", one["rows"], 256)
        return StatesTile(one["rows"], one["num_warps"])
    if one["form"] not in FORMS:
        raise ValueError(f"form is {one['form']!r}, which is none of {', '.join(FORMS)}")
    _power("rows", one["rows"], 256, LEAST_ROWS if one["form"] == PROJECTED else 1)
    return VerifyTile(one["rows"], one["num_warps"], one["form"])


def checked(table: GdnTable) -> GdnTable:
    """``table``. Raises ValueError unless every shape has a rule."""
    for rule in table.prefill:
        _number("min_tokens", rule.min_tokens, 0)
        _number("min_mean", rule.min_mean, 0)
    last = table.prefill[-1] if table.prefill else None
    if last is None or (last.way.runs, last.min_tokens, last.min_mean) != (OWN, 0, 0):
        raise ValueError("the last rule of prefill is not 'own' from 0 tokens on, 0 a row")
    tiles: tuple[DecodeRule | VerifyRule | StatesRule, ...] = (*table.decode, *table.verify, *table.states)
    for one in tiles:
        _number("min_programs", one.min_programs, 0)
        if one.state_bytes not in STATE_BYTES:
            raise ValueError(f"state_bytes is {one.state_bytes!r}, which is none of 4, 2")
    for one in table.states:
        _number("max_tokens", one.max_tokens, 1)
    for size in STATE_BYTES:
        if not any((rule.state_bytes, rule.min_programs) == (size, 0) for rule in table.decode):
            raise ValueError(f"decode has no rule for states of {size} bytes from 0 programs on")
        counts = {rule.max_tokens for rule in table.verify if rule.state_bytes == size}
        for count in counts:
            _number("max_tokens", count, 1)
            if not any(
                (rule.state_bytes, rule.max_tokens, rule.min_programs) == (size, count, 0) for rule in table.verify
            ):
                raise ValueError(f"verify has no rule for {count} tokens and states of {size} bytes from 0 programs on")
        if not counts:
            raise ValueError(f"verify has no rule for states of {size} bytes")
    return table


def _prefill_rule(one: dict[str, Any]) -> PrefillRule:
    return PrefillRule(parse_way(one), one["min_tokens"], one["min_mean"], _text(one, "why"))


def _rows_of_drafts(kind: type[Any], one: dict[str, Any]) -> tuple[Any, ...]:
    tile = parse_tile(kind, one)
    return one["state_bytes"], one["max_tokens"], one["min_programs"], tile, _text(one, "why")


def _own_object(way: PrefillWay) -> dict[str, Any]:
    return {} if way.own is None else asdict(way.own)


def _text(one: dict[str, Any], name: str) -> str:
    if not isinstance(one[name], str) or not one[name]:
        raise ValueError(f"{name} is {one[name]!r}, which is no text")
    return str(one[name])


def _number(name: str, value: object, least: int, most: int = 1 << 40) -> None:
    if type(value) is not int or not least <= value <= most:
        raise ValueError(f"{name} is {value!r}, which is no whole number from {least} on{_up_to(most)}")


def _power(name: str, value: object, most: int, least: int = 1) -> None:
    _number(name, value, least, most)
    if isinstance(value, int) and value & (value - 1):
        raise ValueError(f"{name} is {value}, which is no power of two")


def _up_to(most: int) -> str:
    return "" if most == 1 << 40 else f" up to {most}"
