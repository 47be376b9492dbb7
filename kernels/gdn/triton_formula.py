"""The delta rule's formulas on one head's tile, shared by every kernel that goes token by token."""

import triton
import triton.language as tl

EPSILON = tl.constexpr(1e-6)  # of the L2 norm
LARGEST = tl.constexpr(65504.0)  # of float16


@triton.jit
def as_stored(s, state):
    """s in the type that ``state`` points at; what float16 cannot hold stops at its largest value, NaN stays NaN."""
    if state.dtype.element_ty == tl.float16:
        s = tl.where(s > LARGEST, LARGEST, tl.where(s < -LARGEST, -LARGEST, s))
    return s.to(state.dtype.element_ty)


@triton.jit
def softplus(x):
    return tl.maximum(x, 0.0) + tl.log(1.0 + tl.exp(-tl.abs(x)))


@triton.jit
def decay_of(a, A_log, dt_bias):
    """exp(g), what is left of the state after a token's decay."""
    return tl.exp(-tl.exp(A_log) * softplus(a + dt_bias))


@triton.jit
def add_write(s, written, k):
    """s + written k^T, with one rounding an element wherever it stands: decodes and commits of a token round alike.

    Left to the compiler, either product of ``s * decay + written * k`` may become part of the sum.
    """
    return tl.fma(tl.broadcast_to(written[:, None], s.shape), tl.broadcast_to(k[None, :], s.shape), s)


@triton.jit
def advance(s, q, k, v, decay, beta):
    """One token: the state [V, K] after it, what was written [V], and the output [V]."""
    s = s * decay
    written = beta * (v - tl.sum(s * k[None, :], 1))
    s = add_write(s, written, k)
    return s, written, tl.sum(s * q[None, :], 1)


@triton.jit
def advance_parts(s, q, k, v, decay, beta):
    """The state and the output of `advance`, of a tile that holds K in parts: s [P, V, K / P], q and k [P, K / P].

    As many elements as a multiprocessor moves at once, 128 bytes, make a part. Then 8 threads and not 32 have a row,
    and adding up what they have takes three exchanges a sum instead of five, and a quarter of the rows each.
    """
    k, s = tl.broadcast_to(k[:, None, :], s.shape), s * decay
    written = beta * (v - tl.sum(tl.sum(s * k, 0), 1))
    s = tl.fma(tl.broadcast_to(written[None, :, None], s.shape), k, s)
    return s, tl.sum(tl.sum(s * q[:, None, :], 0), 1)


@triton.jit
def advance_once(s, q, k, v, decay, beta):
    """The same for a single token, without what was written: both sums over K are of the state before the token.

    Neither waits for the other then: with S' = decay S + written k^T, S' q is decay S q + (k . q) written. Of several
    tokens in a row `advance` is quicker, whose registers are free sooner (benchmarks/NOTES.md).
    """
    read_k, read_q = tl.sum(s * k[None, :], 1), tl.sum(s * q[None, :], 1)
    written = beta * (v - decay * read_k)
    return add_write(s * decay, written, k), decay * read_q + tl.sum(k * q, 0) * written
