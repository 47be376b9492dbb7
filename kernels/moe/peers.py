"""The experts of many tokens by an engine's grouped product, where that is faster than our own: `..offers` for them.

An engine's adapter offers functions (``OFFERS``) and has them tried once, at its start (:func:`try_offers`). How many
tokens go where is data: :mod:`.peer_table`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Choice
from ..gemm.reference import FP8, GROUP
from ..gpus import Target
from ..integers import padded_tokens
from ..offers import AUTO, Offers, capability_of
from . import peer_table


@dataclass(frozen=True)
class PeerCall:
    """One product of R rows, sorted by expert; each expert's begin at a multiple of ``alignment``, padded in between.

    rows ``[R, K]`` float8_e4m3fn with factors ``[R, K/128]`` float32, which lie column by column (strides 1, R);
    weight ``[E, N, K]`` float8_e4m3fn with weight_factors ``[E, N/128, K/128]`` float32, both contiguous; ends ``[E]``
    int32, behind each expert's last row (where it would begin, if it has none); out ``[R, N]`` bfloat16, to be filled.
    Rows that no expert has hold anything, and may be given anything.
    """

    rows: Tensor
    factors: Tensor
    weight: Tensor
    weight_factors: Tensor
    ends: Tensor
    alignment: int
    out: Tensor


@dataclass(frozen=True)
class Peer:
    """A grouped product that an engine offers; it must give equal bits for equal inputs and wait for no host."""

    name: str
    function: Callable[[PeerCall], None]


class ExpertShape(NamedTuple):
    """What a function was built for: w13 ``[experts, 2 * inner, hidden]``."""

    experts: int
    hidden: int
    inner: int


class Plan(NamedTuple):
    """Who runs the experts of a step, the height of its tiles, and the rows that any routing of it fits into."""

    peer: str
    alignment: int
    rows: int


OFFERS: Offers[Peer, ExpertShape] = Offers("experts of prefills")


def rows_for(tokens: int, choices: int, experts: int, alignment: int) -> int:
    """Rows that any routing of so many tokens fits into: each expert pads less than a tile."""
    pairs = padded_tokens(tokens) * choices
    return (pairs // alignment + min(experts, pairs)) * alignment


def has_whole_blocks(w13: Tensor, w13_scale: Tensor | None) -> bool:
    """Whether these are FP8 weights in blocks of 128x128, none of which is cut off at an edge."""
    if w13_scale is None or w13.dtype is not FP8:
        return False
    experts, double_inner, hidden = w13.shape
    return w13_scale.shape == (experts, double_inner // GROUP, hidden // GROUP)


def plan_for(tokens: int, choices: int, w13: Tensor, w13_scale: Tensor | None) -> Plan | None:
    """Who runs the experts of so many tokens with such weights; None for our own kernels."""
    if not OFFERS.tried or not has_whole_blocks(w13, w13_scale):
        return None
    experts, double_inner, hidden = w13.shape
    shape = ExpertShape(experts, hidden, double_inner // 2)
    for rule in _rules(w13.device, shape.inner):
        if tokens >= rule.min_tokens and (rule.peer, shape) in OFFERS.tried:
            return Plan(rule.peer, rule.alignment, rows_for(tokens, choices, experts, rule.alignment))
    return None


def try_offers(shape: ExpertShape, device: torch.device) -> None:
    """Run each offer that could be chosen on this GPU for ``shape``, once, and compare it with our own kernels.

    Called at an engine's start, in every process that serves. An offer that fails is withdrawn, with a reason for the
    activation line. Raises ValueError if the one that was asked for by name is not there or failed.
    """
    from .peer_trial import trial

    rules = _rules(device, shape.inner)
    for peer in OFFERS.candidates(rules):
        alignments = sorted({rule.alignment for rule in rules if rule.peer == peer.name})
        if not alignments:
            problem: str | None = "not for GPUs of compute capability {}.{}".format(*capability_of(device))
        elif shape.hidden % GROUP or shape.inner % GROUP:
            problem = f"not for matrices of {shape.inner} and {shape.hidden} columns: FP8 blocks have {GROUP}"
        else:
            problem = next(filter(None, (trial(peer, shape, device, height) for height in alignments)), None)
        if problem is None:
            OFFERS.tried.add((peer.name, shape))
        else:
            OFFERS.say_missing(peer.name, problem)
    OFFERS.insist()


def peer_choices(target: Target) -> list[Choice]:
    """For the table of what runs: who takes over where, and what is missing."""
    return OFFERS.choices([rule for rule in peer_table.RULES if rule.capability == target.capability], _range_of)


def _range_of(name: str) -> str:
    rule = next((rule for rule in _wanted_rules() if rule.peer == name), None)
    if rule is None:
        return "nowhere"
    columns = f" of {rule.min_inner} columns and more an expert" if rule.min_inner else ""
    return f"from {rule.min_tokens} tokens, FP8 blocks{columns}"


def _rules(device: torch.device, inner: int) -> list[peer_table.Rule]:
    capability = capability_of(device)
    return [rule for rule in _wanted_rules() if rule.capability == capability and inner >= rule.min_inner]


def _wanted_rules() -> Sequence[peer_table.Rule]:
    """The table, or what a user made of it."""
    if OFFERS.wanted == AUTO:
        return peer_table.RULES
    wanted = (rule for rule in peer_table.RULES if rule.peer == OFFERS.wanted)
    return [replace(rule, min_tokens=peer_table.MIN_TOKENS, min_inner=0) for rule in wanted]
