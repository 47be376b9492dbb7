"""The short causal convolution of whole rows in Triton: a program walks through a row's tokens."""

import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS, locate_chunk, max_chunks
from .triton_windows import NUM_WARPS, move_windows

CHUNK = 32  # tokens of a row that a program takes one after the other
PER_THREAD = 8  # channels


@triton.jit
def activate(y, SILU: tl.constexpr):
    """SiLU of y, or y."""
    if SILU:
        y = y * tl.sigmoid(y)
    return y


@triton.jit
def earlier(at, window, back: tl.constexpr, first, history, token_stride, window_column, WIDTH: tl.constexpr):
    """What came `back` tokens before a chunk that begins at `at`, in float32.

    `first`: the chunk's first token's number in its row; `history`: the same, of rows that have one; -1 where nothing
    is to be read. Chunks are longer than windows, so only a row's first one reaches back into its history.
    """
    if back >= WIDTH:
        return tl.zeros(at.shape, tl.float32)
    value = tl.load(at - back * token_stride, mask=first >= back, other=0.0).to(tl.float32)
    reaches = (history >= 0) & (history < back)
    return value + tl.load(window + (WIDTH - 1 - back) * window_column, mask=reaches, other=0.0).to(tl.float32)


@triton.jit
def tap(weight, tap_stride, back: tl.constexpr, mask, WIDTH: tl.constexpr):
    """What the input `back` tokens ago is multiplied by, in float32."""
    if back >= WIDTH:
        return tl.zeros(weight.shape, tl.float32)
    return tl.load(weight + (WIDTH - 1 - back) * tap_stride, mask=mask, other=0.0).to(tl.float32)


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "has_initial_state"],
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
    SILU: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Each input is loaded once, while the two before it are worked on, and stays in registers as long as it counts."""
    row, chunk = locate_chunk(
        tl.program_id(0), query_start, query_end, slots, slots_stride, num_rows, CHUNK, BLOCK_ROWS
    )
    if row < 0:
        return
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_end + row).to(tl.int64) - start
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < dim
    first = chunk * CHUNK
    number = tl.where(mask, first, -1)
    history = tl.where(tl.load(has_initial_state + row) != 0, number, -1)
    at = x + (start + first) * x_token + d * x_dim
    window = state + slot * state_slot + d * state_dim
    w = weight + d * weight_dim
    offset = tl.zeros((BLOCK_D,), tl.float32)
    if HAS_BIAS:
        offset = tl.load(bias + d, mask=mask, other=0.0).to(tl.float32)
    w0 = tap(w, weight_tap, 0, mask, WIDTH)
    w1 = tap(w, weight_tap, 1, mask, WIDTH)
    w2 = tap(w, weight_tap, 2, mask, WIDTH)
    w3 = tap(w, weight_tap, 3, mask, WIDTH)
    w4 = tap(w, weight_tap, 4, mask, WIDTH)
    w5 = tap(w, weight_tap, 5, mask, WIDTH)
    w6 = tap(w, weight_tap, 6, mask, WIDTH)
    w7 = tap(w, weight_tap, 7, mask, WIDTH)
    x1 = earlier(at, window, 1, number, history, x_token, state_column, WIDTH)
    x2 = earlier(at, window, 2, number, history, x_token, state_column, WIDTH)
    x3 = earlier(at, window, 3, number, history, x_token, state_column, WIDTH)
    x4 = earlier(at, window, 4, number, history, x_token, state_column, WIDTH)
    x5 = earlier(at, window, 5, number, history, x_token, state_column, WIDTH)
    x6 = earlier(at, window, 6, number, history, x_token, state_column, WIDTH)
    x7 = earlier(at, window, 7, number, history, x_token, state_column, WIDTH)
    count = tl.minimum(length - first, CHUNK).to(tl.int32)
    left = tl.where(mask, count, 0)
    to = out + (start + first) * out_token + d * out_dim
    new = tl.load(at, mask=mask, other=0.0)
    then = tl.load(at + x_token, mask=left > 1, other=0.0)
    for i in range(count):
        coming = tl.load(at + (i + 2) * x_token, mask=i + 2 < left, other=0.0)
        x0 = new.to(tl.float32)
        y = offset + w1 * x1 + w0 * x0
        if WIDTH > 2:
            y += w2 * x2
        if WIDTH > 3:
            y += w3 * x3
        if WIDTH > 4:
            y += w4 * x4 + w5 * x5 + w6 * x6 + w7 * x7
            x7, x6, x5, x4 = x6, x5, x4, x3
        tl.store(to + i * out_token, activate(y, SILU).to(out.dtype.element_ty), mask=mask)
        x3, x2, x1 = x2, x1, x0
        new, then = then, coming


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
    block_d = min(next_power_of_2(dim), 32 * NUM_WARPS * PER_THREAD)
    _prefill_kernel[(max_chunks(tokens, rows, CHUNK), cdiv(dim, block_d))](
        x,
        weight,
        weight if bias is None else bias.contiguous(),
        conv_state,
        out,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        rows,
        dim,
        *x.stride(),
        *weight.stride(),
        *conv_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        WIDTH=weight.shape[1],
        HAS_BIAS=bias is not None,
        SILU=activation == "silu",
        CHUNK=CHUNK,
        BLOCK_D=block_d,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=NUM_WARPS,
    )
    rows_and_slots = (query_start, query_end, state_slots, has_initial_state)
    move_windows(x, weight.shape[1], conv_state, *rows_and_slots, snapshot)
