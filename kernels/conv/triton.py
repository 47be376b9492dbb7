"""The short causal convolution in Triton."""

import triton
import triton.language as tl
from torch import Tensor

from ..ranges import BLOCK_ROWS, locate_chunk, max_chunks

BLOCK_T = 16
# The state is shifted in place. That is safe because every channel's columns are read and written by one thread, which
# holds as long as a block has at least one channel a thread.
NUM_WARPS = 4
BLOCK_D = 32 * NUM_WARPS


@triton.jit
def _activate(y, SILU: tl.constexpr):
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def store_window(
    target,
    target_column,
    history,
    history_column,
    has_history,
    x_row,
    x_token,
    length,
    in_dim,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the W - 1 inputs that end after `length` tokens of a row; those before its first token are its history.

    Columns go lowest first, so `target` may be where the history stands.
    """
    for column in tl.static_range(WIDTH - 1):
        position = length - (WIDTH - 1) + column
        last = tl.zeros((BLOCK_D,), tl.float32)
        if position >= 0:
            last = tl.load(x_row + position * x_token, mask=in_dim, other=0.0).to(tl.float32)
        elif has_history:
            last = tl.load(history + (length + column) * history_column, mask=in_dim, other=0.0).to(tl.float32)
        tl.store(target + column * target_column, last.to(target.dtype.element_ty), mask=in_dim)


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "slots_stride"],
    do_not_specialize_on_alignment=[
        "query_start",
        "query_end",
        "slots",
        "has_initial_state",
        "snapshot_positions",
        "snapshot_slots",
    ],
)
def _prefill_kernel(
    x,
    weight,
    bias,
    state,
    out,
    query_start,
    query_end,
    slots,
    has_initial_state,
    snapshot_positions,
    snapshot_slots,
    num_rows,
    dim,
    x_token,
    x_dim,
    weight_dim,
    weight_tap,
    state_slot,
    state_dim,
    state_column,
    out_token,
    out_dim,
    slots_stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    row, chunk = locate_chunk(
        tl.program_id(0), query_start, query_end, slots, slots_stride, num_rows, BLOCK_T, BLOCK_ROWS
    )
    if row < 0:
        return
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_end + row).to(tl.int64) - start
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    has_history = tl.load(has_initial_state + row) != 0
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    x_row = x + start * x_token + d * x_dim
    state_row = state + slot * state_slot + d * state_dim
    t = chunk * BLOCK_T + tl.arange(0, BLOCK_T)

    y = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    if HAS_BIAS:
        y += tl.load(bias + d, mask=in_dim, other=0.0).to(tl.float32)[None, :]
    for tap in tl.static_range(WIDTH):
        w = tl.load(weight + d * weight_dim + tap * weight_tap, mask=in_dim, other=0.0).to(tl.float32)
        source = (t + (tap - (WIDTH - 1))).to(tl.int64)
        inside = (source >= 0) & (source < length)
        value = tl.load(x_row[None, :] + source[:, None] * x_token, mask=inside[:, None] & in_dim[None, :], other=0.0)
        y += value.to(tl.float32) * w[None, :]
    if (chunk == 0) & has_history:
        for tap in tl.static_range(WIDTH - 1):
            w = tl.load(weight + d * weight_dim + tap * weight_tap, mask=in_dim, other=0.0).to(tl.float32)
            column = (t + tap).to(tl.int64)
            before = column < WIDTH - 1
            kept = tl.load(
                state_row[None, :] + column[:, None] * state_column, mask=before[:, None] & in_dim[None, :], other=0.0
            )
            y += kept.to(tl.float32) * w[None, :]
    y = _activate(y, SILU)
    tl.store(
        out + (start + t)[:, None] * out_token + d[None, :] * out_dim,
        y.to(out.dtype.element_ty),
        mask=(t < length)[:, None] & in_dim[None, :],
    )

    if chunk == 0:  # alone reads the history, and so may overwrite it
        tl.debug_barrier()
        if HAS_SNAPSHOT:
            taken = tl.load(snapshot_positions + row).to(tl.int64)
            target = tl.load(snapshot_slots + row).to(tl.int64)
            if (target >= 0) & (taken > 0) & (taken <= length):
                snapshot_row = state + target * state_slot + d * state_dim
                store_window(
                    snapshot_row,
                    state_column,
                    state_row,
                    state_column,
                    has_history,
                    x_row,
                    x_token,
                    taken,
                    in_dim,
                    WIDTH,
                    BLOCK_D,
                )
        store_window(
            state_row,
            state_column,
            state_row,
            state_column,
            has_history,
            x_row,
            x_token,
            length,
            in_dim,
            WIDTH,
            BLOCK_D,
        )


def causal_conv1d_prefill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    activation: str | None,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.conv.causal_conv1d_prefill`; arguments are checked there."""
    tokens, dim = x.shape
    rows = query_start.shape[0]
    _prefill_kernel[(max_chunks(tokens, rows, BLOCK_T), triton.cdiv(dim, BLOCK_D))](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        conv_state,
        out,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        *(snapshot or (query_start, query_start)),
        rows,
        dim,
        *x.stride(),
        *weight.stride(),
        *conv_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_SNAPSHOT=snapshot is not None,
        SILU=activation == "silu",
        BLOCK_T=BLOCK_T,
        BLOCK_D=BLOCK_D,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=NUM_WARPS,
    )


@triton.jit(
    do_not_specialize=["max_query_len", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "num_accepted_tokens", "snapshot_slots"],
)
def _update_kernel(
    x,
    weight,
    bias,
    state,
    out,
    query_start,
    query_end,
    slots,
    num_accepted_tokens,
    snapshot_slots,
    max_query_len,
    dim,
    x_token,
    x_dim,
    weight_dim,
    weight_tap,
    state_slot,
    state_dim,
    state_column,
    out_token,
    out_dim,
    slots_stride,
    WIDTH: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_ACCEPTED: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
    SILU: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.minimum(tl.load(query_end + row).to(tl.int64) - start, max_query_len).to(tl.int32)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (length <= 0):
        return
    first = 0
    if HAS_ACCEPTED:
        first = tl.load(num_accepted_tokens + row).to(tl.int32) - 1
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    in_dim = d < dim
    x_row = x + start * x_token + d * x_dim
    state_row = state + slot * state_slot + d * state_dim
    history = state_row + first * state_column

    for j in range(length):
        y = tl.zeros((BLOCK_D,), tl.float32)
        if HAS_BIAS:
            y += tl.load(bias + d, mask=in_dim, other=0.0).to(tl.float32)
        for tap in tl.static_range(WIDTH):
            w = tl.load(weight + d * weight_dim + tap * weight_tap, mask=in_dim, other=0.0).to(tl.float32)
            if j + tap < WIDTH - 1:
                value = tl.load(history + (j + tap) * state_column, mask=in_dim, other=0.0).to(tl.float32)
            else:
                value = tl.load(x_row + (j + tap - (WIDTH - 1)) * x_token, mask=in_dim, other=0.0).to(tl.float32)
            y += value * w
        y = _activate(y, SILU)
        tl.store(out + (start + j) * out_token + d * out_dim, y.to(out.dtype.element_ty), mask=in_dim)

    if HAS_SNAPSHOT:
        target = tl.load(snapshot_slots + row).to(tl.int64)
        if target >= 0:
            snapshot_row = state + target * state_slot + d * state_dim
            store_window(
                snapshot_row,
                state_column,
                history,
                state_column,
                True,
                x_row,
                x_token,
                length,
                in_dim,
                WIDTH,
                BLOCK_D,
            )
    # Columns move down, lowest first, so each is read before it is overwritten.
    for column in tl.static_range(WIDTH - 2):
        kept = tl.load(history + (column + 1) * state_column, mask=in_dim)
        tl.store(state_row + column * state_column, kept, mask=in_dim)
    for j in range(length):
        new = tl.load(x_row + j * x_token, mask=in_dim).to(tl.float32)
        tl.store(state_row + (WIDTH - 2 + j) * state_column, new.to(state.dtype.element_ty), mask=in_dim)


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    num_accepted_tokens: Tensor | None,
    max_query_len: int,
    out: Tensor,
    activation: str | None,
    snapshot_slots: Tensor | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.conv.causal_conv1d_update`; arguments are checked there."""
    dim = x.shape[1]
    _update_kernel[(query_start.shape[0], triton.cdiv(dim, BLOCK_D))](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        conv_state,
        out,
        query_start,
        query_end,
        state_slots,
        query_start if num_accepted_tokens is None else num_accepted_tokens,
        query_start if snapshot_slots is None else snapshot_slots,
        max_query_len,
        dim,
        *x.stride(),
        *weight.stride(),
        *conv_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        HAS_ACCEPTED=num_accepted_tokens is not None,
        HAS_SNAPSHOT=snapshot_slots is not None,
        SILU=activation == "silu",
        BLOCK_D=BLOCK_D,
        num_warps=NUM_WARPS,
    )
