"""Prefill by what an engine has installed, where that is faster than our own kernels.

No engine is imported here. An engine's adapter offers functions (:func:`offer_prefill`) and has them tried once, at its
start (:func:`try_offers`): that builds what is compiled at first use, so that no request waits for a compiler, and
compares the result with our own kernels', so that a changed convention is found before it serves. What was not tried
for a shape, or failed, is never chosen. Which shapes go where is data: :mod:`.peer_table`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from ..dispatch import Choice
from ..gpus import Target
from . import peer_table
from .packed import PackedRows
from .reference import Gates

AUTO, OWN = "auto", "own"


@dataclass(frozen=True)
class PeerCall:
    """What a function is given: T tokens of N rows, one behind the other; everything contiguous.

    q, k ``[T, HK, K]`` L2-normalised, q not yet scaled by ``K ** -0.5``; v, out ``[T, HV, V]``, out to be filled;
    decay ``[T, HV]`` float32, g or exp(g) as the function wants it; beta ``[T, HV]`` float32; state ``[N, HV, V, K]``
    float32, the initial states, which may be overwritten; keep_checkpoints: whether states on the grid are wanted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    decay: Tensor
    beta: Tensor
    state: Tensor
    out: Tensor
    rows: PackedRows
    keep_checkpoints: bool


PeerFunction = Callable[[PeerCall], tuple[Tensor, Tensor | None]]
"""Returns the final states ``[N, HV, V, K]`` and, if asked, the states after every ``rows.snapshot_grid`` tokens."""


@dataclass(frozen=True)
class Peer:
    """A function an engine offers; log_decay: whether it wants g rather than exp(g); checkpoints: whether it can keep
    states on a grid; dtypes and head_dim: what it takes.
    """

    name: str
    function: PeerFunction
    log_decay: bool
    checkpoints: bool = False
    dtypes: tuple[torch.dtype, ...] = (torch.bfloat16,)
    head_dim: int = 128


class HeadShape(NamedTuple):
    """What a function was built for."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    dtype: torch.dtype


_offers: dict[str, Peer] = {}
_missing: dict[str, str] = {}  # name -> why it is not there
_tried: set[tuple[str, HeadShape, bool]] = set()  # the last: with checkpoints
_wanted = AUTO


def prefer_prefill(name: str) -> None:
    """Make prefills run ``name`` wherever it can: "auto" (the table), "own", or what an engine offers.

    For a user's switch, read once at start.
    """
    global _wanted
    _wanted = name


def offer_prefill(peer: Peer) -> None:
    """An engine's function, to be chosen once it has been tried; offering a name again replaces what it was."""
    _offers[peer.name] = peer
    _missing.pop(peer.name, None)
    _tried.difference_update([entry for entry in _tried if entry[0] == peer.name])


def say_missing(name: str, why: str) -> None:
    """An engine's adapter looked for ``name`` and did not find it; the activation line says so."""
    _offers.pop(name, None)
    _missing[name] = why


def withdraw_all() -> None:
    """Forget every offer and what was said of it."""
    _offers.clear()
    _missing.clear()
    _tried.clear()


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def choose_peer(shape: HeadShape, packed: PackedRows, device: torch.device, snapshots: bool) -> Peer | None:
    """Who runs a prefill of these rows, by what the host knows of them; None for our own kernels."""
    if not _offers or _wanted == OWN or 0 in packed.lengths or packed.tokens == 0:
        return None
    if snapshots:
        bytes_each = 4 * shape.num_v_heads * shape.head_v_dim * shape.head_k_dim
        if packed.checkpoints * bytes_each > peer_table.MOST_CHECKPOINT_BYTES:
            return None
    if _wanted != AUTO:
        return _offers[_wanted] if (_wanted, shape, snapshots) in _tried else None
    mean = packed.tokens / len(packed.lengths)
    for rule in _rules(device):
        fits = packed.tokens >= rule.min_tokens and mean >= rule.min_mean
        if fits and (rule.peer, shape, snapshots) in _tried:
            return _offers[rule.peer]
    return None


def run_peer(
    peer: Peer,
    packed: PackedRows,
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """A prefill by ``peer``; arguments as for :func:`.gdn_prefill`, where they are checked.

    Tokens of skipped rows (negative slot) that lie between the others get zeros.
    """
    from . import triton_peers

    value_dim, key_dim = ssm_state.shape[2:]
    ranges = (query_start, query_end)
    parts = triton_peers.split(
        mixed_qkv,
        gates,
        num_k_heads,
        (key_dim, value_dim),
        packed,
        *ranges,
        max_query_len,
        state_slots,
        peer.log_decay,
    )
    state = triton_peers.collect(ssm_state, state_slots, has_initial_state)
    window = out[packed.first : packed.first + packed.tokens]
    direct = window.is_contiguous() and window.dtype == mixed_qkv.dtype
    target = window if direct else torch.empty(window.shape, dtype=mixed_qkv.dtype, device=out.device)
    final, checkpoints = peer.function(PeerCall(*parts, state, target, packed, snapshot is not None))
    if not direct:
        window.copy_(target)
    triton_peers.put_back(final, checkpoints, packed, ssm_state, *ranges, state_slots, snapshot)


def try_offers(shape: HeadShape, device: torch.device, snapshot_grid: int | None = None) -> None:
    """Run each offer that could be chosen on this GPU for ``shape``, once, and compare it with our own kernels.

    Called at an engine's start, in every process that serves. snapshot_grid: where the engine's prefills keep
    snapshots, None if they never do. An offer that fails is withdrawn, with a reason for the activation line.
    Raises ValueError if the one that was asked for by name (:func:`prefer_prefill`) is not there or failed.
    """
    from .peer_trial import trial

    candidates = {rule.peer for rule in _rules(device)} if _wanted == AUTO else {_wanted}
    for name in sorted(candidates & _offers.keys()):
        peer = _offers[name]
        sizes = (shape.head_k_dim, shape.head_v_dim)
        if shape.dtype not in peer.dtypes or sizes != (peer.head_dim, peer.head_dim):
            say_missing(name, f"not for {shape.dtype} tokens with heads of {sizes[0]} and {sizes[1]}")
            continue
        grids = [None] if snapshot_grid is None or not peer.checkpoints else [None, snapshot_grid]
        for grid in grids:
            problem = trial(peer, shape, device, grid)
            if problem is not None:
                say_missing(name, problem)
                break
            _tried.add((name, shape, grid is not None))
    if _wanted not in (AUTO, OWN) and not any(name == _wanted for name, *_ in _tried):
        why = _missing.get(_wanted, "no engine offers it")
        raise ValueError(f"prefill by {_wanted!r} was asked for, but it cannot be had: {why}; ask for 'auto' or 'own'")


def launch_around_peers(
    packed: PackedRows,
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """What :func:`run_peer` launches before and after each offer that may run such a prefill, without the offer.

    For a warm-up, with rows that are skipped; the offers themselves were built when they were tried.
    """
    _, v_heads, value_dim, key_dim = ssm_state.shape
    shape = HeadShape(num_k_heads, v_heads, key_dim, value_dim, mixed_qkv.dtype)
    for name, peer in _offers.items():
        if (name, shape, snapshot is not None) in _tried:
            run_peer(
                replace(peer, function=_give_back),
                packed,
                mixed_qkv,
                gates,
                ssm_state,
                num_k_heads,
                query_start,
                query_end,
                max_query_len,
                state_slots,
                has_initial_state,
                out,
                snapshot,
            )


def _give_back(call: PeerCall) -> tuple[Tensor, Tensor | None]:
    return call.state, call.state if call.keep_checkpoints else None


def prefill_choices(target: Target) -> list[Choice]:
    """For the table of what runs: our own kernels, who takes over where, and what is missing.

    Where no engine has offered anything in this process, those that would be tried on that GPU.
    """
    choices = [
        Choice("bfloat16 tokens, heads of a multiple of 64", why="two kernels, chunks of 64, products in bfloat16"),
        Choice(
            "other types and heads", why="two kernels, chunks of 64, products in TF32, split in three but for float16"
        ),
    ]
    if _wanted == AUTO and not _offers and not _missing:
        why = "where the engine has it and its trial at start succeeds"
        rules = [rule for rule in peer_table.RULES if rule.capability == target.capability]
        return [*choices, *(Choice(_range_of(rule.peer), rule.peer, why) for rule in rules)]
    for name in dict.fromkeys((*(rule.peer for rule in peer_table.RULES), *_offers, *_missing)):
        tried = [keeps for tried_name, _, keeps in _tried if tried_name == name]
        if tried:
            where = _range_of(name) + ("" if True in tried else ", not where snapshots are kept")
            choices.append(Choice(where, name, "the engine's, tried at its start"))
        elif name in _missing:
            choices.append(Choice(f"no {name}", why=_missing[name]))
    return choices


def _range_of(name: str) -> str:
    if _wanted == name:
        return "wherever it can, as asked"
    rule = next((rule for rule in peer_table.RULES if rule.peer == name), None)
    return "nowhere" if rule is None else f"from {rule.min_tokens} tokens on, {rule.min_mean} a row"


def _rules(device: torch.device) -> list[peer_table.Rule]:
    capability = capability_of(device)
    return [rule for rule in peer_table.RULES if rule.capability == capability]
