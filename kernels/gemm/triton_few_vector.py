"""One or two rows with a weight matrix as vector products: the rows as they are, behind a gate, or one row normed."""

import triton
import triton.language as tl
from triton.language.extra import cuda

from .triton import widened


@triton.jit
def _columns(ptr, lanes, left, WHOLE: tl.constexpr):
    """These columns of a row as float32, zeros beyond those that are left."""
    if WHOLE:
        return tl.load(ptr + lanes).to(tl.float32)
    return tl.load(ptr + lanes, mask=lanes < left, other=0.0).to(tl.float32)


@triton.jit
def _weights(w_ptrs, rows, N, lanes, left, WHOLE: tl.constexpr):
    """This step's columns of the weight's rows, as they are stored."""
    mask = (rows < N)[:, None, None]
    if not WHOLE:
        mask = mask & (lanes < left)[None]
    return tl.load(w_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _factors(scale_ptr, begins, k, K, scale_stride_k, SCALE_K: tl.constexpr, SCALED: tl.constexpr):
    factor = tl.full([1, 1], 1.0, dtype=tl.float32)
    if SCALED:
        factor_ptrs = scale_ptr + (k + begins) // SCALE_K * scale_stride_k
        factor = tl.load(factor_ptrs, mask=begins < K - k, other=0.0)[None, :]
    return factor


@triton.jit
def _normed(
    x,
    other_ptr,
    total_ptr,
    kept_ptr,
    norm_weight,
    lanes,
    K,
    eps,
    stores,
    dtype: tl.constexpr,
    ADDED: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """norm(x + other) of a whole row, rounded as if it had been stored; the program that `stores` does store both."""
    if ADDED:
        total = (x + _columns(other_ptr, lanes, K, WHOLE)).to(dtype)
        if stores:
            tl.store(total_ptr + lanes, total, mask=lanes < K)
        x = total.to(tl.float32)  # the next layer reads the rounded sum, so that is what is normalised
    scale = tl.rsqrt(tl.sum(tl.sum(x * x, axis=1), axis=0) / K + eps)
    y = (x * scale * (1.0 + norm_weight)).to(dtype)
    if KEPT:
        if stores:
            tl.store(kept_ptr + lanes, y, mask=lanes < K)
    return y.to(tl.float32)


@triton.jit
def _row_of_x(
    x_ptr,
    other_ptr,
    total_ptr,
    kept_ptr,
    norm_weight,
    row,
    k,
    K,
    lanes,
    x_stride,
    other_stride,
    eps,
    stores,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Columns of one row of x from the kth on, as float32."""
    x = _columns(x_ptr + row * x_stride + k, lanes, K - k, WHOLE)
    other_ptr += row * other_stride + k
    if GATED:
        x *= tl.sigmoid(_columns(other_ptr, lanes, K - k, WHOLE))
    if NORMED:
        x = _normed(
            x, other_ptr, total_ptr + row * K, kept_ptr + row * K, norm_weight, lanes, K, eps, stores,
            x_ptr.dtype.element_ty, ADDED, KEPT, WHOLE,
        )  # fmt: skip
    return x


@triton.jit
def _store_row(out_ptr, m, N, rows, sums):
    tl.store(out_ptr + m * N + rows, tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty), mask=rows < N)


@triton.jit
def vector_products(
    x_ptr,
    other_ptr,
    norm_ptr,
    total_ptr,
    kept_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    tile,
    m,
    M,
    N,
    K,
    x_stride,
    other_stride,
    w_stride,
    scale_stride_n,
    scale_stride_k,
    eps,
    stores,
    ROWS_OF_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    ONE_STEP: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[m + i, n] = weight row n . x row m + i, for one or two rows of x and BLOCK_N rows of the weight.

    ``other`` is the gate (GATED) or what is added before the norm (ADDED). LOAD columns lie together in a thread, which
    sums them first; what is left of a row is multiplied by its blocks' factors, and summed over the threads once.
    """
    first = tile * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
    lanes = begins[:, None] + tl.arange(0, LOAD)[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None, None] * w_stride + lanes[None]
    scale_ptr += (first // SCALE_N) * scale_stride_n
    tl.static_assert(not NORMED or (ONE_STEP and ROWS_OF_X == 1), "a norm is of one row, which a program holds whole")
    row0 = m.to(tl.int64)
    row1 = tl.minimum(m + 1, M - 1).to(tl.int64)  # beyond M: the one before once more
    if ONE_STEP:  # all of the weight's part is on its way before x is there
        w = _weights(w_ptrs, rows, N, lanes, K, WHOLE)
        factor = _factors(scale_ptr, begins, 0, K, scale_stride_k, SCALE_K, SCALED)
        norm_weight = _columns(norm_ptr, lanes, K, WHOLE) if NORMED else 0.0
        if EARLY:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()
        w = widened(w)
        x = _row_of_x(
            x_ptr, other_ptr, total_ptr, kept_ptr, norm_weight, row0, 0, K, lanes, x_stride, other_stride, eps, stores,
            GATED, NORMED, ADDED, KEPT, WHOLE,
        )  # fmt: skip
        _store_row(out_ptr, row0, N, rows, tl.sum(w * x[None], axis=2) * factor)
        if ROWS_OF_X > 1:
            x = _row_of_x(
                x_ptr, other_ptr, total_ptr, kept_ptr, 0.0, row1, 0, K, lanes, x_stride, other_stride, eps, stores,
                GATED, False, False, False, WHOLE,
            )  # fmt: skip
            _store_row(out_ptr, row1, N, rows, tl.sum(w * x[None], axis=2) * factor)
    else:
        if EARLY:
            cuda.gdc_wait()
            cuda.gdc_launch_dependents()
        sums0 = tl.zeros([BLOCK_N, BLOCK_K // LOAD], dtype=tl.float32)
        sums1 = sums0
        for k in range(0, K, BLOCK_K):
            w = widened(_weights(w_ptrs + k, rows, N, lanes, K - k, WHOLE))
            factor = _factors(scale_ptr, begins, k, K, scale_stride_k, SCALE_K, SCALED)
            x = _row_of_x(
                x_ptr, other_ptr, total_ptr, kept_ptr, 0.0, row0, k, K, lanes, x_stride, other_stride, eps, stores,
                GATED, False, False, False, WHOLE,
            )  # fmt: skip
            sums0 += tl.sum(w * x[None], axis=2) * factor
            if ROWS_OF_X > 1:
                x = _row_of_x(
                    x_ptr, other_ptr, total_ptr, kept_ptr, 0.0, row1, k, K, lanes, x_stride, other_stride, eps, stores,
                    GATED, False, False, False, WHOLE,
                )  # fmt: skip
                sums1 += tl.sum(w * x[None], axis=2) * factor
        _store_row(out_ptr, row0, N, rows, sums0)
        if ROWS_OF_X > 1:
            _store_row(out_ptr, row1, N, rows, sums1)
