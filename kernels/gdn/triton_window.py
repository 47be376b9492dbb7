"""The convolution's windows in a decode step: a new input goes in, the output comes out."""

import triton
import triton.language as tl

from .triton_formula import EPSILON


@triton.jit
def advance_window(
    x,
    x_column,
    weight,
    weight_channel,
    weight_tap,
    windows,
    window_slot,
    window_channel,
    window_column,
    slot,
    snapshot,
    channel,
    in_dim,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    """The convolution's output for one new input of these channels, in float32; their window moves on by it.

    The window is in registers, whole, before any of it is written, and no other program has these channels.
    """
    tap = tl.arange(0, BLOCK_W)
    new = (tap == WIDTH - 1)[None, :]
    source = windows + slot * window_slot + channel[:, None] * window_channel + tap[None, :] * window_column
    window = tl.load(source, mask=in_dim[:, None] & (tap < WIDTH - 1)[None, :], other=0.0).to(tl.float32)
    value = tl.load(x + channel * x_column, mask=in_dim, other=0.0).to(tl.float32)
    window = tl.where(new, value[:, None], window)
    taps = weight + channel[:, None] * weight_channel + tap[None, :] * weight_tap
    w = tl.load(taps, mask=in_dim[:, None] & (tap < WIDTH)[None, :], other=0.0).to(tl.float32)
    y = tl.sum(window * w, 1)
    tl.debug_barrier()  # one element may be held by several threads: all have read before one writes
    moved = in_dim[:, None] & ((tap > 0) & (tap < WIDTH))[None, :]
    target = source - window_column
    tl.store(target, window.to(windows.dtype.element_ty), mask=moved)
    if HAS_SNAPSHOT:
        kept = in_dim[:, None] & ((tap > 0) & (tap < tl.where(snapshot >= 0, WIDTH, 0)))[None, :]
        tl.store(target + (snapshot - slot) * window_slot, window.to(windows.dtype.element_ty), mask=kept)
    return y * tl.sigmoid(y)


@triton.jit
def advance_keys(
    x,
    x_column,
    weight,
    weight_channel,
    weight_tap,
    windows,
    window_slot,
    window_channel,
    window_column,
    slot,
    snapshot,
    k_head,
    k_index,
    scale,
    K_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_W: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    """A key head's q, times ``scale``, and k [BLOCK_K], both of length one before that; their windows move on."""
    k_mask = k_index < KEY_DIM
    channel = k_head * KEY_DIM + k_index
    q = advance_window(
        x,
        x_column,
        weight,
        weight_channel,
        weight_tap,
        windows,
        window_slot,
        window_channel,
        window_column,
        slot,
        snapshot,
        channel,
        k_mask,
        WIDTH,
        BLOCK_W,
        HAS_SNAPSHOT,
    )
    k = advance_window(
        x,
        x_column,
        weight,
        weight_channel,
        weight_tap,
        windows,
        window_slot,
        window_channel,
        window_column,
        slot,
        snapshot,
        K_HEADS * KEY_DIM + channel,
        k_mask,
        WIDTH,
        BLOCK_W,
        HAS_SNAPSHOT,
    )
    return q * (scale / tl.sqrt(tl.sum(q * q, 0) + EPSILON)), k / tl.sqrt(tl.sum(k * k, 0) + EPSILON)
