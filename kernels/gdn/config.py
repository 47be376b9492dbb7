"""What runs for which shape, and in which tiles: from a file for this GPU or its family.

`configs/<gpu>/gdn.json`, ``<gpu>`` being a GPU's short name (``h200``), else its family's (``sm90``), else ``any``; the
first that is there is taken whole. `qwen3next tune gdn` writes one for the GPU at hand, and a user's own folder comes
before the shipped one. Every choice hangs on shapes and types alone, which the host knows without asking the GPU.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from ..gpus import NO_GPU, Target
from ..tuned import checked_folder
from .config_file import STATE_BYTES, read_file
from .table import (
    OWN,
    DecodeTile,
    GdnTable,
    OwnPrefill,
    PrefillRule,
    PrefillWay,
    StatesRule,
    StatesTile,
    VerifyTile,
)

CONFIGS = Path(__file__).resolve().parent / "configs"
FILE = "gdn.json"
COMMAND = "qwen3next tune gdn"
ANY = "any"
_MOST_TOKENS = 1 << 40  # of a rule for any number of them

_user_folder: Path | None = None
_forced: GdnTable | None = None


@dataclass(frozen=True)
class Found:
    """A table and the file it is from; None for one that a caller of :func:`forced` gave."""

    table: GdnTable
    path: Path | None


def use_folder(folder: Path | None) -> None:
    """Look for files in ``folder`` before the shipped ones; None: only there. For a user's switch, read at start.

    Raises ValueError where there is no such folder, or one of its files for any GPU cannot be read.
    """
    global _user_folder
    if folder is not None:
        checked_folder(folder, f"*/{FILE}", read_file, COMMAND)
    _user_folder = folder


@contextmanager
def forced(table: GdnTable) -> Iterator[None]:
    """Every choice inside is by ``table``, whatever files say: for measuring and warming up."""
    global _forced
    before, _forced = _forced, table
    try:
        yield
    finally:
        _forced = before


def find(target: Target) -> Found:
    """The table for that GPU. Raises ValueError for a file that is damaged."""
    if _forced is not None:
        return Found(_forced, None)
    return _from_files(_folders(), target)


def table_of(device: torch.device) -> GdnTable:
    """The table for that device; for a CPU the one for any GPU, since its interpreter runs the same kernels."""
    return find(_target_of(device)).table


def shipped(target: Target) -> GdnTable:
    """The table that this package has for that GPU, whatever a user's folder holds."""
    return _from_files((CONFIGS,), target).table


def is_users(path: Path) -> bool:
    """Whether a table's file is from the user's folder."""
    return _user_folder is not None and path.is_relative_to(_user_folder)


@functools.lru_cache
def _from_files(folders: tuple[Path, ...], target: Target) -> Found:
    family = "sm{}{}".format(*target.capability)
    places = [folder / name / FILE for folder in folders for name in (target.slug, family, ANY)]
    path = next((path for path in places if path.is_file()), None)
    if path is None:
        raise ValueError(f"{places[-1]} is missing: install this package anew")
    return Found(read_file(path), path)


@functools.lru_cache
def _target_of(device: torch.device) -> Target:
    if device.type != "cuda":
        return NO_GPU
    return Target(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def _folders() -> tuple[Path, ...]:
    return (CONFIGS,) if _user_folder is None else (_user_folder, CONFIGS)


def prefill_rules(table: GdnTable, tokens: int, rows: int) -> Iterator[PrefillRule]:
    """The rules that fit a prefill of so many tokens in so many rows, in order."""
    for rule in table.prefill:
        if tokens >= rule.min_tokens and tokens >= rule.min_mean * rows:
            yield rule


def own_prefill(table: GdnTable, tokens: int, rows: int) -> OwnPrefill:
    """How our own kernels run such a prefill."""
    return next(rule.way.own for rule in prefill_rules(table, tokens, rows) if rule.way.own is not None)


def decode_tile(table: GdnTable, state_bytes: int, programs: int) -> DecodeTile:
    """For states of so many bytes an element and so many programs (rows times key heads)."""
    rules = (rule for rule in table.decode if rule.state_bytes == state_bytes and programs >= rule.min_programs)
    return max(rules, key=lambda rule: rule.min_programs).tile


def verify_tile(table: GdnTable, state_bytes: int, tokens: int, programs: int) -> VerifyTile:
    """Likewise for rows of so many tokens (programs: rows times value heads); beyond the largest, as for that one."""
    rules = [rule for rule in table.verify if rule.state_bytes == state_bytes and programs >= rule.min_programs]
    most = min((rule.max_tokens for rule in rules if rule.max_tokens >= tokens), default=0)
    most = most or max(rule.max_tokens for rule in rules)
    return max((rule for rule in rules if rule.max_tokens == most), key=lambda rule: rule.min_programs).tile


def states_tile(table: GdnTable, state_bytes: int, tokens: int, programs: int) -> StatesTile | None:
    """For drafts that leave a state a token, in one launch; None: one operation after another."""
    rules = [
        rule
        for rule in table.states
        if rule.state_bytes == state_bytes and rule.max_tokens >= tokens and programs >= rule.min_programs
    ]
    return min(rules, key=lambda rule: (rule.max_tokens, -rule.min_programs)).tile if rules else None


def only(table: GdnTable, choice: PrefillWay | DecodeTile | VerifyTile | StatesTile | None) -> GdnTable:
    """``table`` with this one choice wherever there is one of its kind; our own kernels where a peer cannot.

    A StatesTile is for whatever verification leaves a state a token, and None is for none of them.
    """
    if isinstance(choice, PrefillWay):
        own = next(rule for rule in reversed(table.prefill) if rule.way.runs == OWN)
        rule = PrefillRule(choice, 0, 0, "forced")
        return replace(table, prefill=(rule,) if choice.runs == OWN else (rule, own))
    if isinstance(choice, DecodeTile):
        return replace(table, decode=tuple(replace(rule, tile=choice) for rule in table.decode))
    if isinstance(choice, VerifyTile):
        return replace(table, verify=tuple(replace(rule, tile=choice) for rule in table.verify))
    if choice is None:
        return replace(table, states=())
    return replace(table, states=tuple(StatesRule(size, _MOST_TOKENS, 0, choice, "forced") for size in STATE_BYTES))


def every_table(table: GdnTable, state_bytes: int, tokens: int) -> tuple[GdnTable, ...]:
    """Tables that each always choose the same, and together all that ``table`` can choose of our own kernels.

    For states of so many bytes an element, and rows of so many tokens that are verified.
    """
    ways = [rule.way for rule in table.prefill if rule.way.runs == OWN]
    starts = {rule.min_programs for rule in table.decode} | {rule.min_programs for rule in table.verify}
    programs = sorted(starts | {rule.min_programs for rule in table.states})
    kinds: tuple[list[PrefillWay] | list[DecodeTile] | list[VerifyTile] | list[StatesTile | None], ...] = (
        list(dict.fromkeys(ways)),
        list(dict.fromkeys(decode_tile(table, state_bytes, count) for count in programs)),
        list(dict.fromkeys(verify_tile(table, state_bytes, tokens, count) for count in programs)),
        # Beside prompts one operation runs after another, whatever the rules are.
        list(dict.fromkeys((None, *(states_tile(table, state_bytes, tokens, count) for count in programs)))),
    )
    tables = []
    for number in range(max(map(len, kinds))):
        one = table
        for choices in kinds:
            one = only(one, choices[min(number, len(choices) - 1)])
        tables.append(one)
    return tuple(tables)
