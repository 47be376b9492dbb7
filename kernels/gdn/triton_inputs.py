"""A few tokens of a row convolved all at once, each input read once, and set side by side in registers."""

import triton
import triton.language as tl


@triton.jit
def _inputs_of(
    x,
    x_token,
    window,
    window_column,
    index,
    dim,
    length,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
):
    """What some channels have in the window and then in the row's tokens, a vector an input; each is read once."""
    inputs = ()
    for tap in tl.static_range(WIDTH - 1):
        value = tl.load(window + tap * window_column, mask=index < dim, other=0.0).to(tl.float32)
        inputs = inputs + (value,)
    for j in tl.static_range(TOKENS):
        value = tl.load(x + j * x_token, mask=index < tl.where(j < length, dim, 0), other=0.0).to(tl.float32)
        inputs = inputs + (value,)
    return inputs


@triton.jit
def _summed(
    inputs,
    taps,
    weight_tap,
    in_dim,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """These inputs convolved, a vector a token; one sum over the taps does not ask whether an input is the window's."""
    weights = ()
    for tap in tl.static_range(WIDTH):
        w = tl.load(taps + tap * weight_tap, mask=in_dim, other=0.0).to(tl.float32)
        weights = weights + (w,)
    found = ()
    for j in tl.static_range(PLACES):
        y = tl.zeros(in_dim.shape, tl.float32)
        if j < TOKENS:
            for tap in tl.static_range(WIDTH):
                y += inputs[j + tap] * weights[tap]
            y = y * tl.sigmoid(y)
        found = found + (y,)
    return found


@triton.jit
def convolved(
    x,
    x_token,
    x_column,
    taps,
    weight_channel,
    weight_tap,
    window,
    window_channel,
    window_column,
    kept,
    first_channel,
    index,
    dim,
    length,
    recorded,
    WIDTH: tl.constexpr,
    CONV_DIM: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """A head's channels of a row's tokens, convolved, a vector a token; zeros behind TOKENS, so that there are PLACES.

    The first `recorded` inputs go to `kept`. (Token by token, where the state fills the registers, 128 a thread become
    175 by reading each input once, so there a tile of all tokens is convolved a tap at a time.)
    """
    channel = first_channel + index
    x, window = x + channel * x_column, window + channel * window_channel
    inputs = _inputs_of(x, x_token, window, window_column, index, dim, length, WIDTH, TOKENS)
    for j in tl.static_range(TOKENS):
        noted = index < tl.where(j < recorded, dim, 0)
        tl.store(kept + j * CONV_DIM + channel, inputs[WIDTH - 1 + j].to(kept.dtype.element_ty), mask=noted)
    return _summed(inputs, taps + channel * weight_channel, weight_tap, index < dim, WIDTH, TOKENS, PLACES)


@triton.jit
def convolved_in_place(
    x,
    x_token,
    x_column,
    taps,
    weight_channel,
    weight_tap,
    window,
    first_column,
    window_channel,
    window_column,
    first_channel,
    index,
    dim,
    length,
    WIDTH: tl.constexpr,
    TOKENS: tl.constexpr,
    PLACES: tl.constexpr,
):
    """The same of a window that begins in `first_column`; without its oldest input, and with the row's behind it, it is
    left from column 0 on. No other program may have these channels. All threads of this one meet in between.
    """
    channel = first_channel + index
    x, window = x + channel * x_column, window + channel * window_channel
    history = window + first_column * window_column
    inputs = _inputs_of(x, x_token, history, window_column, index, dim, length, WIDTH, TOKENS)
    tl.debug_barrier()  # one element may be held by several threads: all have read before one writes
    for column in tl.static_range(WIDTH - 2 + TOKENS):
        moved = index < tl.where(column < WIDTH - 2 + length, dim, 0)
        tl.store(window + column * window_column, inputs[column + 1].to(window.dtype.element_ty), mask=moved)
    return _summed(inputs, taps + channel * weight_channel, weight_tap, index < dim, WIDTH, TOKENS, PLACES)


@triton.jit
def side_by_side(vectors, LEVELS: tl.constexpr):
    """2 ** LEVELS vectors [N] as the columns of [N, 2 ** LEVELS], in registers: nothing moves between threads."""
    for level in tl.static_range(LEVELS):
        joined = ()
        for n in tl.static_range(1 << (LEVELS - 1 - level)):
            joined = joined + (tl.join(vectors[n], vectors[n + (1 << (LEVELS - 1 - level))]),)
        vectors = joined
    return tl.reshape(vectors[0], (vectors[0].shape[0], 1 << LEVELS))
