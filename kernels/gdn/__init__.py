"""The gated delta rule over slot-addressed state: chunked prefill, decode by one token, verification of draft tokens.

Tokens are rows of ``mixed_qkv [T, conv_dim]``, the convolution's output: q | k | v flat, head after head. q and k are
L2-normalised here (eps 1e-6) and q is scaled by ``K ** -0.5``; the decay and the write strength come from a and b
(:func:`.reference.gdn_gates`). Value head h uses key head ``h // (HV / HK)``. The formula is that of Gated Delta
Networks (arXiv 2412.06464, section 3); arithmetic and the running state are float32 whatever the state's dtype.

Rows are token ranges ``[query_start[n], query_end[n])`` of a flat batch, disjoint and in any order. Empty rows and rows
with a negative slot are skipped: nothing of theirs is read or written. Tokens in no range keep what ``out`` held.
No two rows of a call may share a slot that one of them writes.

A step of which every row decodes takes :func:`gdn_decode_fused` instead, with the convolution before and the gated norm
behind the delta rule in one launch. Where the engine commits what it accepted after the step, every row that verifies
drafts takes :func:`gdn_verify_fused`, and :func:`gdn_commit` moves the states of all layers; where drafts leave a state
each, many rows take :func:`gdn_verify_states`.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..checks import check_optional
from ..conv import causal_conv1d_prefill
from ..dispatch import TRITON, Choice, choose, declare
from . import reference
from .choices import prefill_choices
from .convolution import FUSED_WIDTH, Convolution
from .drafts import gdn_commit, gdn_verify_fused
from .fused import gdn_decode_fused
from .packed import PackedRows
from .peers import HeadShape, choose_peer, run_peer
from .records import DraftRecords
from .reference import SNAPSHOT_GRID
from .states import gdn_verify_states
from .validation import (
    check_decode_rows,
    check_output_slots,
    check_packed,
    check_prefill_rows,
    check_tokens,
    check_verify_rows,
)

__all__ = [
    "SNAPSHOT_GRID",
    "Convolution",
    "DraftRecords",
    "PackedRows",
    "gdn_commit",
    "gdn_decode",
    "gdn_decode_fused",
    "gdn_prefill",
    "gdn_verify",
    "gdn_verify_fused",
    "gdn_verify_states",
]

declare("gdn_prefill", cuda=prefill_choices)
declare("gdn_decode", cuda=(Choice("one token a row, beside rows of prompts", why="token by token"),))
declare("gdn_verify", cuda=(Choice("other drafts that leave a state each", why="token by token"),))


def gdn_prefill(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    *,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot_positions: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    packed: PackedRows | None = None,
    convolution: Convolution | None = None,
    backend: str | None = None,
) -> None:
    """Run whole token ranges through the delta rule in chunks and leave the final state in each row's slot, in place.

    Args:
        mixed_qkv: ``[T, 2 * HK * K + HV * V]`` float32, float16 or bfloat16, any strides.
        a, b: ``[T, HV]``, any strides; ``A_log``, ``dt_bias``: ``[HV]``.
        ssm_state: ``[S, HV, V, K]``, any strides, float32, float16 or bfloat16.
        num_k_heads: HK.
        query_start, query_end: ``[N]`` integers; ``state_slots`` ``[N]`` integers, any stride.
        max_query_len: no row is longer; it bounds the launch grid.
        has_initial_state: ``[N]`` bool; where false the state starts from zero and the slot is not read.
        out: ``[T, HV, V]``, any strides.
        snapshot_positions, snapshot_slots: ``[N]`` integers, both or neither: the state as it is after that many tokens
            of the row goes to that slot too. A position is a multiple of ``SNAPSHOT_GRID`` or the row's length; nothing
            is stored at any other, nor where the slot is negative. No row may read or write a slot given here.
        packed: the rows once more, if they lie one behind the other in order and the host knows their lengths: then an
            engine's own function may run them (:mod:`.peers`). Tokens of skipped rows get zeros in ``out`` then.
        backend: None (Triton on CUDA, else the reference), ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    rows = check_prefill_rows(mixed_qkv, query_start, query_end, max_query_len, state_slots, has_initial_state)
    check_optional(rows, mixed_qkv, snapshot_positions=snapshot_positions, snapshot_slots=snapshot_slots)
    snapshot = None
    if snapshot_positions is not None and snapshot_slots is not None:
        snapshot = (snapshot_positions, snapshot_slots)
    chosen = choose(mixed_qkv, backend)
    if rows == 0 or mixed_qkv.shape[0] == 0 or max_query_len == 0:
        return
    run: Callable[..., None] | None = None
    if chosen == TRITON and packed is not None:
        check_packed(packed, rows, mixed_qkv)
        _, v_heads, value_dim, key_dim = ssm_state.shape
        shape = HeadShape(num_k_heads, v_heads, key_dim, value_dim, mixed_qkv.dtype)
        peer = choose_peer(shape, packed, mixed_qkv.device, snapshot is not None)
        if peer is not None:
            run = partial(run_peer, peer, packed)
            if convolution is not None and convolution.width <= FUSED_WIDTH:
                run, convolution = partial(run, convolution=convolution), None
    if convolution is not None:
        inputs, mixed_qkv = mixed_qkv, torch.empty(mixed_qkv.shape, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        causal_conv1d_prefill(
            inputs,
            convolution.weight,
            None,
            convolution.state,
            query_start=query_start,
            query_end=query_end,
            state_slots=state_slots,
            has_initial_state=has_initial_state,
            out=mixed_qkv,
            snapshot_positions=snapshot_positions,
            snapshot_slots=snapshot_slots,
            backend=backend,
        )
    if run is None and chosen == TRITON:
        from . import triton_prefill

        run = triton_prefill.gdn_prefill
    (run or reference.gdn_prefill)(
        mixed_qkv,
        (a, b, A_log, dt_bias),
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


def gdn_decode(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    *,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One new token a row: the state of each row's slot is read, advanced and written back.

    Arguments as for :func:`gdn_prefill`; of a row that is longer than one token only the first is taken. The new state
    goes to ``snapshot_slots[n]`` too, where that is not negative; no row may read or write a slot given there.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    rows = check_decode_rows(mixed_qkv, query_start, query_end, state_slots)
    check_optional(rows, mixed_qkv, snapshot_slots=snapshot_slots)
    _recurrent(
        rows,
        mixed_qkv,
        (a, b, A_log, dt_bias),
        ssm_state,
        num_k_heads,
        query_start,
        query_end,
        1,
        state_slots,
        state_slots.unsqueeze(1),
        out,
        snapshot_slots,
        backend,
    )


def gdn_verify(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    *,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    initial_slots: Tensor,
    output_slots: Tensor,
    out: Tensor,
    backend: str | None = None,
) -> None:
    """A few tokens a row (the last accepted one and its drafts), keeping the state after each of them.

    Rollback is the choice of ``output_slots[n, j]``, j the last accepted token, as the next initial slot.

    Args:
        max_query_len: no row is longer, at most M; it may be a host constant of a captured graph.
        initial_slots: ``[N]`` integers, any stride: where in ``ssm_state`` the rows start; a row with a negative one is
            skipped. It may equal one of the row's own output slots.
        output_slots: ``[N, M]`` integers, any strides: the state after token j goes to slot ``[n, j]``, or nowhere if
            that is negative.
        Others: as for :func:`gdn_prefill`.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``max_query_len`` exceeds M.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    rows = check_verify_rows(mixed_qkv, query_start, query_end, max_query_len, initial_slots=initial_slots)
    check_output_slots(mixed_qkv, rows, max_query_len, output_slots)
    _recurrent(
        rows,
        mixed_qkv,
        (a, b, A_log, dt_bias),
        ssm_state,
        num_k_heads,
        query_start,
        query_end,
        max_query_len,
        initial_slots,
        output_slots,
        out,
        None,
        backend,
    )


def _recurrent(
    rows: int,
    mixed_qkv: Tensor,
    gates: reference.Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    initial_slots: Tensor,
    output_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None,
    backend: str | None,
) -> None:
    """Decode and verify are one operation: decode writes the state after its only token back where it came from."""
    chosen = choose(mixed_qkv, backend)
    if rows == 0 or mixed_qkv.shape[0] == 0 or max_query_len == 0:
        return
    if chosen == TRITON:
        from . import triton_recurrent

        run = triton_recurrent.gdn_recurrent
    else:
        run = reference.gdn_recurrent
    run(
        mixed_qkv,
        gates,
        ssm_state,
        num_k_heads,
        query_start,
        query_end,
        max_query_len,
        initial_slots,
        output_slots,
        out,
        snapshot_slots,
    )
