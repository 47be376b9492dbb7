"""The kernel behind `triton_few`: vector products and small matrix products of one weight matrix or two."""

import triton
import triton.language as tl

from .triton import widened, widened_to


@triton.jit
def _columns(ptr, lanes, left, WHOLE: tl.constexpr):
    """These columns of a row as float32, zeros beyond those that are left."""
    if WHOLE:
        return tl.load(ptr + lanes).to(tl.float32)
    return tl.load(ptr + lanes, mask=lanes < left, other=0.0).to(tl.float32)


@triton.jit
def _add_row(
    sums,
    w,
    factor,
    x_ptr,
    gate_ptr,
    row,
    M,
    lanes,
    left,
    x_stride,
    gate_stride,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """sums + what these columns of the weight's rows and of one row of x, gated, add to their products."""
    row = tl.minimum(row, M - 1).to(tl.int64)  # beyond M: any, for its product is not stored
    x = _columns(x_ptr + row * x_stride, lanes, left, WHOLE)
    if GATED:
        x *= tl.sigmoid(_columns(gate_ptr + row * gate_stride, lanes, left, WHOLE))
    return sums + tl.sum(w * x[None], axis=2) * factor


@triton.jit
def _store_row(out_ptr, m, M, N, rows, sums):
    out = tl.sum(sums, axis=1).to(out_ptr.dtype.element_ty)
    if m < M:
        tl.store(out_ptr + m.to(tl.int64) * N + rows, out, mask=rows < N)


@triton.jit
def _vector_products(
    x_ptr,
    gate_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    tile,
    m,
    M,
    N,
    K,
    x_stride,
    gate_stride,
    w_stride,
    scale_stride_n,
    scale_stride_k,
    ROWS_OF_X: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
    GATED: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """out[m + i, n] = weight row n . x row m + i, for up to two rows of x and BLOCK_N rows of the weight.

    LOAD columns lie together in a thread, which sums them first; what is left of a row is multiplied by its blocks'
    factors, and summed over the threads once.
    """
    first = tile * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
    lanes = begins[:, None] + tl.arange(0, LOAD)[None, :]
    w_ptrs = w_ptr + rows.to(tl.int64)[:, None, None] * w_stride + lanes[None]
    scale_ptr += (first // SCALE_N) * scale_stride_n
    sums0 = tl.zeros([BLOCK_N, BLOCK_K // LOAD], dtype=tl.float32)
    sums1, sums2, sums3 = sums0, sums0, sums0
    for k in range(0, K, BLOCK_K):
        mask = (rows < N)[:, None, None]
        if not WHOLE:
            mask = mask & (lanes < K - k)[None]
        w = widened(tl.load(w_ptrs + k, mask=mask, other=0.0, eviction_policy="evict_first"))
        factor = tl.full([1, 1], 1.0, dtype=tl.float32)
        if SCALED:
            factor_ptrs = scale_ptr + (k + begins) // SCALE_K * scale_stride_k
            factor = tl.load(factor_ptrs, mask=begins < K - k, other=0.0)[None, :]
        x, gate, left = x_ptr + k, gate_ptr + k, K - k
        sums0 = _add_row(sums0, w, factor, x, gate, m, M, lanes, left, x_stride, gate_stride, GATED, WHOLE)
        if ROWS_OF_X > 1:
            sums1 = _add_row(sums1, w, factor, x, gate, m + 1, M, lanes, left, x_stride, gate_stride, GATED, WHOLE)
        if ROWS_OF_X > 2:
            sums2 = _add_row(sums2, w, factor, x, gate, m + 2, M, lanes, left, x_stride, gate_stride, GATED, WHOLE)
        if ROWS_OF_X > 3:
            sums3 = _add_row(sums3, w, factor, x, gate, m + 3, M, lanes, left, x_stride, gate_stride, GATED, WHOLE)
    _store_row(out_ptr, m, M, N, rows, sums0)
    if ROWS_OF_X > 1:
        _store_row(out_ptr, m + 1, M, N, rows, sums1)
    if ROWS_OF_X > 2:
        _store_row(out_ptr, m + 2, M, N, rows, sums2)
    if ROWS_OF_X > 3:
        _store_row(out_ptr, m + 3, M, N, rows, sums3)


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
):
    """out[:, n] for BLOCK_N rows of the weight: PARTS products of BLOCK_K columns at once, each with its own sum.

    The weight is the left operand: x may then be a tile of eight rows, and takes that much less of the shared memory
    that the weight's loads wait in.
    """
    first = tile * BLOCK_N
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
    gate_ptr,
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
    gate_stride,
    w_stride,
    w2_stride,
    scale_stride_n,
    scale_stride_k,
    scale2_stride_n,
    scale2_stride_k,
    ROWS_OF_X: tl.constexpr,
    VECTOR: tl.constexpr,
    GATED: tl.constexpr,
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
):
    """The first programs take the first weight, others (PAIR) the second. DEPTH: columns of a thread, or of a part."""
    tile = tl.program_id(0)
    m = tl.program_id(1) * ROWS_OF_X
    tiles = tl.cdiv(N, BLOCK_N)
    if tile < tiles:
        if VECTOR:
            _vector_products(
                x_ptr, gate_ptr, w_ptr, scale_ptr, out_ptr, tile, m, M, N, K, x_stride, gate_stride, w_stride,
                scale_stride_n, scale_stride_k, ROWS_OF_X, BLOCK_N, BLOCK_K, DEPTH, SCALE_N, SCALE_K, SCALED, GATED,
                WHOLE,
            )  # fmt: skip
        else:
            _matrix_product(
                x_ptr, w_ptr, scale_ptr, out_ptr, tile, M, N, K, x_stride, w_stride, scale_stride_n, scale_stride_k,
                ROWS_OF_X, BLOCK_N, BLOCK_K // DEPTH, DEPTH, SCALE_N, SCALE_K, SCALED, WHOLE, UPCAST,
            )  # fmt: skip
    if PAIR:
        if tile >= tiles:
            if VECTOR:
                _vector_products(
                    x_ptr, gate_ptr, w2_ptr, scale2_ptr, out2_ptr, tile - tiles, m, M, N2, K, x_stride, gate_stride,
                    w2_stride, scale2_stride_n, scale2_stride_k, ROWS_OF_X, BLOCK_N2, BLOCK_K2, DEPTH2, SCALE_N2,
                    SCALE_K2, SCALED2, GATED, WHOLE2,
                )  # fmt: skip
            else:
                _matrix_product(
                    x_ptr, w2_ptr, scale2_ptr, out2_ptr, tile - tiles, M, N2, K, x_stride, w2_stride, scale2_stride_n,
                    scale2_stride_k, ROWS_OF_X, BLOCK_N2, BLOCK_K2 // DEPTH2, DEPTH2, SCALE_N2, SCALE_K2, SCALED2,
                    WHOLE2, UPCAST,
                )  # fmt: skip
