"""What a few tokens of a row, convolved, read of a state all at once, and how they go on without it.

With S the state before the row and P its convolved keys and queries as columns k_0, q_0, k_1, .., R = S P holds all
that any token reads of S. A token turns S into decay S + u k^T, so it turns R into decay R + u (k^T P): the gated delta
rule on 2 M columns instead of K, with a row of the Gram matrix P^T P in place of k. What normalises keys and queries is
read off the Gram matrix's diagonal, and applied to R and to it.

Products are made by matrix units, of factors in parts that these hold; they err about as much as float32's do.
"""

import triton
import triton.language as tl

LEAST_PLACES = 4  # tokens whose keys and queries fill the 8 columns of a matrix instruction


@triton.jit
def _behind(x, y):
    """Two [R, N] as one [R, 2 N], in registers."""
    return tl.reshape(tl.permute(tl.join(x, y), (0, 2, 1)), (x.shape[0], 2 * x.shape[1]))


@triton.jit
def _folded(x, PARTS: tl.constexpr):
    """The sum of the parts [R, N] that stand side by side in [R, PARTS * N]; each is in registers of one thread."""
    return tl.sum(tl.reshape(x, (x.shape[0], PARTS, x.shape[1] // PARTS)), 1)


@triton.jit
def _bf16_parts(x):
    """x [R, N] as three parts that have all of its bits, and zeros: [R, 4 N] of values that bfloat16 holds."""
    first = x.to(tl.bfloat16).to(tl.float32)
    second = (x - first).to(tl.bfloat16).to(tl.float32)
    third = (x - first - second).to(tl.bfloat16).to(tl.float32)
    return _behind(_behind(first, second), _behind(third, tl.zeros(x.shape, tl.float32)))


@triton.jit
def times_state(s, p, UPCAST: tl.constexpr):
    """s [V, K] times p [K, N], to float32's accuracy. UPCAST: the interpreter's products know no bfloat16."""
    if s.dtype == tl.bfloat16:  # one part by itself
        parts = _bf16_parts(p)
        if UPCAST:
            found = _folded(tl.dot(s.to(tl.float32), parts, input_precision="ieee"), 4)
        else:
            found = _folded(tl.dot(s, parts.to(tl.bfloat16)), 4)
    else:
        found = tl.dot(s.to(tl.float32), p, input_precision="tf32x3")
    return found


@triton.jit
def gram_of(p):
    """p^T p of [K, N], with p as what tf32 holds of it without rounding and the rest, of which it holds nearly all.

    Side by side both have 16 columns for N = 8, which are the rows that an instruction takes.
    """
    high = (p.to(tl.uint32, bitcast=True) & 0xFFFFE000).to(tl.float32, bitcast=True)
    parts = _behind(high, p - high)
    gram = _folded(tl.dot(tl.trans(parts), parts, input_precision="tf32"), 2)
    return tl.sum(tl.reshape(gram, (2, p.shape[1], p.shape[1])), 0)


@triton.jit
def pass_token(j, by_k, by_q, written, o, v, decay, beta, gram, unit, PLACES: tl.constexpr):
    """Token j goes by what the state makes of all keys and queries; its write and its output join the others."""
    token = tl.arange(0, PLACES)
    column = tl.arange(0, 2 * PLACES)
    now = token == j
    left = tl.sum(tl.where(now, decay, 0.0), 0)
    products = tl.sum(tl.where((column == 2 * j)[:, None], gram, 0.0), 0)
    products = products * unit * tl.sum(tl.where(column == 2 * j, unit, 0.0), 0)
    k_k, k_q = tl.split(tl.reshape(products, (PLACES, 2)))
    by_k, by_q = by_k * left, by_q * left
    u = tl.sum(tl.where(now[None, :], v - by_k, 0.0), 1) * tl.sum(tl.where(now, beta, 0.0), 0)
    by_k += u[:, None] * k_k[None, :]
    by_q += u[:, None] * k_q[None, :]
    written = tl.where(now[None, :], u[:, None], written)
    return by_k, by_q, written, tl.where(now[None, :], by_q, o)
