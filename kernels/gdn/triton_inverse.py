"""The inverse of a chunk's triangular system, in three ways: which of them runs is a GPU's table's choice."""

import triton
import triton.language as tl


@triton.jit
def _nilpotent_inverse(A, identity, PRECISION: tl.constexpr):
    """``inverse(I + A)`` where ``A^8 = 0``: exactly ``(I - A) (I + A^2) (I + A^4)``."""
    A2 = tl.dot(A, A, input_precision=PRECISION)
    A4 = tl.dot(A2, A2, input_precision=PRECISION)
    X = identity - A
    X += tl.dot(X, A2, input_precision=PRECISION)
    return X + tl.dot(X, A4, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse(A, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """``inverse(I + A)`` for strictly lower triangular ``A [64, 64]`` in float32, in matrix products only.

    With D the inverse of the 8 by 8 diagonal blocks and L the rest of A, it is ``inverse(I + D L) D``, and both A's
    blocks and D L are nilpotent of order 8. Doubling over all 64 rows at once would not do: with repeated keys the
    powers grow like binomial coefficients, 1e18 over 64 rows, but at most 35 over 8. A Newton step at the end squares
    what rounding to TF32 left of the error.
    """
    tl.static_assert(CHUNK == 64)
    c = tl.arange(0, CHUNK)
    identity = tl.where(c[:, None] == c[None, :], 1.0, 0.0)
    in_block = (c // 8)[:, None] == (c // 8)[None, :]
    D = _nilpotent_inverse(tl.where(in_block, A, 0.0), identity, PRECISION)
    M = tl.dot(D, tl.where(in_block, 0.0, A), input_precision=PRECISION)
    T = tl.dot(_nilpotent_inverse(M, identity, PRECISION), D, input_precision=PRECISION)
    residual = identity - T - tl.dot(A, T, input_precision="tf32x3")
    return T + tl.dot(T, residual, input_precision=PRECISION)


@triton.jit
def unit_lower_inverse_by_blocks(A, CHUNK: tl.constexpr, PRECISION: tl.constexpr):
    """``inverse(I + A)`` as above, in four matrix products: diagonal blocks of 16 by 16 by substitution, in float32.

    With D the inverse of the diagonal blocks and L the rest of A, ``M = D L`` is nilpotent of order 4, and
    ``inverse(I + M) D = (I - M) (I + M^2) D``.
    """
    BLOCK: tl.constexpr = 16
    BLOCKS: tl.constexpr = CHUNK // BLOCK
    tl.static_assert(BLOCKS == 4)
    b = tl.arange(0, BLOCKS)
    r = tl.arange(0, BLOCK)
    diagonal = (b[:, None] == b[None, :])[:, None, :, None]
    own = tl.sum(tl.where(diagonal, tl.reshape(A, (BLOCKS, BLOCK, BLOCKS, BLOCK)), 0.0), 2)
    X = tl.zeros((BLOCKS, BLOCK, BLOCK), tl.float32) + tl.where(r[:, None] == r[None, :], 1.0, 0.0)[None, :, :]
    for i in tl.static_range(1, BLOCK):
        here = (r == i)[None, :, None]
        row = tl.sum(tl.where(here, own, 0.0), 1)
        X = tl.where(here, X - tl.sum(row[:, :, None] * X, 1)[:, None, :], X)
    D = tl.reshape(tl.where(diagonal, X[:, :, None, :], 0.0), (CHUNK, CHUNK))
    c = tl.arange(0, CHUNK)
    in_block = (c // BLOCK)[:, None] == (c // BLOCK)[None, :]
    M = tl.dot(D, tl.where(in_block, 0.0, A), input_precision=PRECISION)
    T = D - tl.dot(M, D, input_precision=PRECISION)
    return T + tl.dot(tl.dot(M, M, input_precision=PRECISION), T, input_precision=PRECISION)


@triton.jit
def _joined(block):
    """Where the second block of a pair meets the first. Of columns the compiler knows most, so little is compared."""
    return (block[:, None] == block[None, :] + 1) & (block[None, :] % 2 == 0)


@triton.jit
def unit_lower_inverse_by_merging(A, CHUNK: tl.constexpr):
    """``inverse(I + A)`` in float32 for ``A [64, 64]`` of elements within [-1, 1], of which what lies below the
    diagonal is read.

    With D the inverse of diagonal blocks and L what joins two of them, the inverse of the joined blocks is
    ``D - D L D``, since L D L = 0; blocks of two need no product. Every factor is a true inverse or a part of A, so
    nothing grows as powers of A do. The elements of an inverse are within [-1, 1] too (products of contractions between
    unit vectors): float16, which rounds as TF32 does, holds all of them.
    """
    tl.static_assert(CHUNK == 64)
    c = tl.arange(0, CHUNK)
    D = tl.where(c[:, None] == c[None, :], 1.0, 0.0) - tl.where(_joined(c), A, 0.0)
    for level in tl.static_range(1, 6):
        L = tl.where(_joined(c >> level), A, 0.0).to(tl.float16)
        half = D.to(tl.float16)
        D -= tl.dot(tl.dot(half, L).to(tl.float16), half)
    return D
