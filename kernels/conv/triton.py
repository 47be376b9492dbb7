"""The short causal convolution in Triton: an update by one token or a few; whole rows are `triton_prefill`'s."""

import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv
from .triton_prefill import activate, causal_conv1d_prefill
from .triton_windows import BLOCK_D, NUM_WARPS, store_window

__all__ = ["causal_conv1d_prefill", "causal_conv1d_update"]


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
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
        y = activate(y, SILU)
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
    _update_kernel[(query_start.shape[0], cdiv(dim, BLOCK_D))](
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
