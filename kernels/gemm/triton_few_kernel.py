"""The kernel behind `triton_few`: vector products (`triton_few_vector`) and small matrix products, of one weight
matrix or two.
"""

import triton
import triton.language as tl
from triton.language.extra import cuda

from .triton import widened_to
from .triton_few_vector import vector_products


@triton.jit
def _matrix_product(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    tile,
    M,
    N,
    K,
    x_stride,
    w_stride,
    scale_stride_n,
    scale_stride_k,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[:, n] for BLOCK_N rows of the weight: PARTS products of BLOCK_K columns at once, each with its own sum.

    The weight is the left operand: x may then be a tile of eight rows, and takes that much less of the shared memory
    that the weight's loads wait in.
    """
    first = tile * BLOCK_N
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    rows = first + tl.arange(0, BLOCK_N)
    ms = tl.arange(0, BLOCK_M)
    parts = tl.arange(0, PARTS)
    cols = parts[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]
    x_ptrs = x_ptr + ms[None, None, :].to(tl.int64) * x_stride + cols[:, :, None]
    w_ptrs = w_ptr + rows.to(tl.int64)[None, :, None] * w_stride + cols[:, None, :]
    scale_ptr += (first // SCALE_N) * scale_stride_n
    sums = tl.zeros([PARTS, BLOCK_N, BLOCK_M], dtype=tl.float32)
    for k in range(0, K, PARTS * BLOCK_K):
        x_mask, w_mask = (ms < M)[None, None, :], (rows < N)[None, :, None]
        if not WHOLE:
            inside = cols < K - k
            x_mask, w_mask = x_mask & inside[:, :, None], w_mask & inside[:, None, :]
        x = tl.load(x_ptrs + k, mask=x_mask, other=0.0)
        w = tl.load(w_ptrs + k, mask=w_mask, other=0.0)
        if UPCAST:
            x = x.to(tl.float32)
        w = widened_to(w, x.dtype) if SCALED else w.to(x.dtype)
        product = tl.dot(w, x, input_precision="ieee")
        if SCALED:
            places = k + parts * BLOCK_K
            product *= tl.load(scale_ptr + places // SCALE_K * scale_stride_k, mask=places < K, other=0.0)[
                :, None, None
            ]
        sums += product
    out = tl.sum(sums, axis=0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + ms.to(tl.int64)[None, :] * N + rows[:, None], out, mask=(ms < M)[None, :] & (rows < N)[:, None])


@triton.jit(do_not_specialize=["M"])
def few_matmul_kernel(
    x_ptr,
    other_ptr,
    norm_ptr,
    total_ptr,
    kept_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    w2_ptr,
    scale2_ptr,
    out2_ptr,
    M,
    N,
    N2,
    K,
    x_stride,
    other_stride,
    w_stride,
    w2_stride,
    scale_stride_n,
    scale_stride_k,
    scale2_stride_n,
    scale2_stride_k,
    eps,
    ROWS_OF_X: tl.constexpr,
    VECTOR: tl.constexpr,
    GATED: tl.constexpr,
    NORMED: tl.constexpr,
    ADDED: tl.constexpr,
    KEPT: tl.constexpr,
    PAIR: tl.constexpr,
    UPCAST: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    DEPTH: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK_N2: tl.constexpr,
    BLOCK_K2: tl.constexpr,
    DEPTH2: tl.constexpr,
    SCALE_N2: tl.constexpr,
    SCALE_K2: tl.constexpr,
    SCALED2: tl.constexpr,
    WHOLE2: tl.constexpr,
    ONE_STEP: tl.constexpr,
    ONE_STEP2: tl.constexpr,
    EARLY: tl.constexpr,
):
    """The first programs take the first weight, others (PAIR) the second. DEPTH: columns of a thread, or of a part."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * ROWS_OF_X
    tiles = tl.cdiv(N, BLOCK_N)
    if tile < tiles:
        if VECTOR:
            vector_products(
                x_ptr, other_ptr, norm_ptr, total_ptr, kept_ptr, w_ptr, scale_ptr, out_ptr, tile, m, M, N, K, x_stride,
                other_stride, w_stride, scale_stride_n, scale_stride_k, eps, tile == 0, ROWS_OF_X, BLOCK_N, BLOCK_K,
                DEPTH, SCALE_N, SCALE_K, SCALED, GATED, NORMED, ADDED, KEPT, WHOLE, ONE_STEP, EARLY,
            )  # fmt: skip
        else:
            _matrix_product(
                x_ptr, w_ptr, scale_ptr, out_ptr, tile, M, N, K, x_stride, w_stride, scale_stride_n, scale_stride_k,
                ROWS_OF_X, BLOCK_N, BLOCK_K // DEPTH, DEPTH, SCALE_N, SCALE_K, SCALED, WHOLE, UPCAST, EARLY,
            )  # fmt: skip
    if PAIR:
        if tile >= tiles:
            if VECTOR:
                vector_products(
                    x_ptr, other_ptr, norm_ptr, total_ptr, kept_ptr, w2_ptr, scale2_ptr, out2_ptr, tile - tiles, m, M,
                    N2, K, x_stride, other_stride, w2_stride, scale2_stride_n, scale2_stride_k, eps, False, ROWS_OF_X,
                    BLOCK_N2, BLOCK_K2, DEPTH2, SCALE_N2, SCALE_K2, SCALED2, GATED, NORMED, ADDED, KEPT, WHOLE2,
                    ONE_STEP2, EARLY,
                )  # fmt: skip
            else:
                _matrix_product(
                    x_ptr, w2_ptr, scale2_ptr, out2_ptr, tile - tiles, M, N2, K, x_stride, w2_stride, scale2_stride_n,
                    scale2_stride_k, ROWS_OF_X, BLOCK_N2, BLOCK_K2 // DEPTH2, DEPTH2, SCALE_N2, SCALE_K2, SCALED2,
                    WHOLE2, UPCAST, EARLY,
                )  # fmt: skip
