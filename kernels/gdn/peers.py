"""Prefill by what an engine has installed, where that is faster than our own kernels: `..offers` for this operation.

An engine's adapter offers functions (``OFFERS``) and has them tried once, at its start (:func:`try_offers`). Which
shapes go where is data: :mod:`.config`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..offers import AUTO, Offers
from .config import prefill_rules, table_of
from .convolution import Convolution
from .packed import PackedRows
from .reference import Gates
from .table import OWN

MOST_CHECKPOINT_BYTES = 512 * 1024 * 1024
"""Snapshots are cut out of states kept on a grid by the peer: above this much for them, our own kernels run."""


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


OFFERS: Offers[Peer, tuple[HeadShape, bool]] = Offers("prefill")
"""Tried for a shape, and with states kept on a grid or without."""


def choose_peer(shape: HeadShape, packed: PackedRows, device: torch.device, snapshots: bool) -> Peer | None:
    """Who runs a prefill of these rows, by what the host knows of them; None for our own kernels."""
    if not OFFERS.found or OFFERS.wanted == OWN or 0 in packed.lengths or packed.tokens == 0:
        return None
    if snapshots:
        bytes_each = 4 * shape.num_v_heads * shape.head_v_dim * shape.head_k_dim
        if packed.checkpoints * bytes_each > MOST_CHECKPOINT_BYTES:
            return None
    tried = (shape, snapshots)
    if OFFERS.wanted != AUTO:
        return OFFERS.found[OFFERS.wanted] if (OFFERS.wanted, tried) in OFFERS.tried else None
    for rule in prefill_rules(table_of(device), packed.tokens, len(packed.lengths)):
        if rule.peer == OWN:
            return None
        if (rule.peer, tried) in OFFERS.tried:
            return OFFERS.found[rule.peer]
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
    convolution: Convolution | None = None,
) -> None:
    """A prefill by ``peer``; arguments as for :func:`.gdn_prefill`, where they are checked.

    Tokens of skipped rows (negative slot) that lie between the others get zeros.
    """
    from . import triton_peers
    from .triton_split import split

    ranges = (query_start, query_end)
    parts = split(
        mixed_qkv,
        convolution,
        gates,
        num_k_heads,
        peer.head_dim,
        packed,
        *ranges,
        state_slots,
        has_initial_state,
        peer.log_decay,
        snapshot,
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
    Raises ValueError if the one that was asked for by name is not there or failed.
    """
    from .peer_trial import trial

    for peer in OFFERS.candidates(table_of(device).prefill):
        sizes = (shape.head_k_dim, shape.head_v_dim)
        if shape.dtype not in peer.dtypes or sizes != (peer.head_dim, peer.head_dim):
            why = f"not for {shape.dtype} tokens with heads of {sizes[0]} and {sizes[1]}"
            OFFERS.say_missing(peer.name, why)
            continue
        grids = [None] if snapshot_grid is None or not peer.checkpoints else [None, snapshot_grid]
        for grid in grids:
            problem = trial(peer, shape, device, grid)
            if problem is not None:
                OFFERS.say_missing(peer.name, problem)
                break
            OFFERS.tried.add((peer.name, (shape, grid is not None)))
    OFFERS.insist()


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
    convolution: Convolution | None = None,
) -> None:
    """What :func:`run_peer` launches before and after each offer that may run such a prefill, without the offer.

    For a warm-up, with rows that are skipped; the offers themselves were built when they were tried.
    """
    _, v_heads, value_dim, key_dim = ssm_state.shape
    shape = HeadShape(num_k_heads, v_heads, key_dim, value_dim, mixed_qkv.dtype)
    for name, peer in OFFERS.found.items():
        if (name, (shape, snapshot is not None)) in OFFERS.tried:
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
                convolution,
            )


def _give_back(call: PeerCall) -> tuple[Tensor, Tensor | None]:
    return call.state, call.state if call.keep_checkpoints else None
