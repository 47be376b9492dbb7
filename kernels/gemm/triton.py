"""FP8 quantisation and products in Triton. `scaled_product` is also the core of the mixture of experts."""

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..integers import cdiv
from .policy import require_fp8_units, weight_codes
from .reference import FP8, FP8_MAX, GROUP, block_size

# Rows that one program rounds: one where there are few of them, and enough to keep a memory busy where there are many.
_ROWS_APART = 64
_ROWS_TOGETHER = 32


@triton.jit
def decode_e4m3(codes):
    """The float32 values of E4M3 codes given as bytes, exact; 0x7F and 0xFF are NaN, and there is no infinity.

    Exponent and mantissa go to the low bits of float32's, whose bias is 120 larger: a product with 2**120 makes up for
    it, for codes below the smallest normal one too, since these are float32's own subnormals until then. Few
    instructions count: with 12 a weight an A100's multiprocessors would be slower than its memory.
    """
    signed = codes.to(tl.int8, bitcast=True).to(tl.int32)  # the sign fills what lies above exponent and mantissa
    value = ((signed << 20) & -0x78100000).to(tl.float32, bitcast=True) * 1.329227995784916e36
    return tl.where(tl.abs(value) == 480.0, float("nan"), value)  # what NaN's bits would stand for


@triton.jit
def _w_factor(pointers, mask, ONE_FACTOR: tl.constexpr):
    """The factor of a tile's weights, or those of its columns as a row."""
    if ONE_FACTOR:
        return tl.load(pointers)
    else:
        return tl.load(pointers, mask=mask, other=0.0)[None, :]


@triton.jit
def widened(codes):
    """Weights as float32; FP8 may come as bytes."""
    if codes.dtype == tl.uint8:
        return decode_e4m3(codes)
    return codes.to(tl.float32)


@triton.jit
def widened_to(codes, dtype: tl.constexpr):
    """FP8 weights, which may come as bytes, in a wider type, which is exact.

    By way of float32, whose conversions take pairs and are quick: from E4M3 to bfloat16 a compiler makes F2F
    instructions of single values, of which a multiprocessor starts 16 a cycle, fewer than its memory brings.
    """
    return widened(codes).to(dtype)


@triton.jit
def scaled_product(
    a_ptrs,
    a_mask,
    a_scale_ptrs,
    w_ptrs,
    w_mask,
    w_scale_ptrs,
    second_offset,
    second_scale_offset,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALE_K: tl.constexpr,
    DUAL: tl.constexpr,
    W_FP8: tl.constexpr,
    A_FP8: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_FACTOR: tl.constexpr,
):
    """One tile of a @ w.T, accumulated in float32, and (DUAL) a second one with other rows of w, reading `a` once.

    a_ptrs [BLOCK_M, BLOCK_K] and w_ptrs [BLOCK_K, BLOCK_N] point at the first BLOCK_K columns, whose stride is 1; the
    second tile's weights and scales lie `second_offset` and `second_scale_offset` further on. FP8 weights carry a
    factor every SCALE_K columns (w_scale_ptrs [BLOCK_N], or ONE_FACTOR: a single pointer, for a tile within one
    block), FP8 activations one every GROUP_K (a_scale_ptrs [BLOCK_M]); BLOCK_K divides both, so a factor is constant
    over a step and is applied to the float32 partial sum. With FP8 weights, which may come as bytes, and wider
    activations the weights are widened to the activations' type, which is exact. UPCAST multiplies in float32, for the
    interpreter, which cannot do arithmetic in bf16.
    """
    ks = tl.arange(0, BLOCK_K)
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        inside = ks < K - k
        a = tl.load(a_ptrs + k, mask=a_mask[:, None] & inside[None, :], other=0.0)
        w = tl.load(w_ptrs + k, mask=w_mask[None, :] & inside[:, None], other=0.0)
        if DUAL:
            w2 = tl.load(w_ptrs + second_offset + k, mask=w_mask[None, :] & inside[:, None], other=0.0)
        if UPCAST:
            a = a.to(tl.float32)
        if UPCAST or (W_FP8 and not A_FP8):
            w = widened_to(w, a.dtype)
            if DUAL:
                w2 = widened_to(w2, a.dtype)
        if W_FP8:
            # One factor a row of the tile is one operation an element; the tensor cores leave time for hardly more.
            a_factor = tl.load(a_scale_ptrs + k // GROUP_K, mask=a_mask, other=0.0)[:, None] if A_FP8 else 1.0
            first += tl.dot(a, w, input_precision="ieee") * (
                a_factor * _w_factor(w_scale_ptrs + k // SCALE_K, w_mask, ONE_FACTOR)
            )
            if DUAL:
                second += tl.dot(a, w2, input_precision="ieee") * (
                    a_factor * _w_factor(w_scale_ptrs + second_scale_offset + k // SCALE_K, w_mask, ONE_FACTOR)
                )
        else:
            first = tl.dot(a, w, first, input_precision="ieee")
            if DUAL:
                second = tl.dot(a, w2, second, input_precision="ieee")
    return first, second


@triton.jit
def _round_to_e4m3(x):
    """Round float32 to the nearest E4M3 value, ties to even, still in float32; |x| <= 448.

    For the interpreter, whose own cast loses the carry when a value rounds up to a power of two.
    """
    bits = x.to(tl.int32, bitcast=True)
    normal = ((bits + 0x7FFFF + ((bits >> 20) & 1)) & -0x100000).to(tl.float32, bitcast=True)  # 3 mantissa bits stay
    shift = 24576.0  # 1.5 * 2**14: adding it leaves steps of 2**-9, those of E4M3 below 2**-6
    return tl.where(tl.abs(x) < 0.015625, (x + shift) - shift, normal)


@triton.jit
def round_to_fp8(x, FP8_MAX: tl.constexpr, INTERPRETED: tl.constexpr):
    """Rows of float32 x as values within E4M3's range, for a cast to it, and the factor of each row."""
    peak = tl.max(tl.abs(x), axis=1)
    scale = tl.where(peak > 0, peak / FP8_MAX, 1.0)
    values = tl.minimum(tl.maximum(x / scale[:, None], -FP8_MAX), FP8_MAX)
    if INTERPRETED:
        values = _round_to_e4m3(values)
    return values, scale


@triton.jit
def round_tokens(
    x_ptr,
    codes_ptr,
    scale_ptr,
    rows,
    group,
    M,
    K,
    num_groups,
    x_stride,
    FP8_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """One group of columns of these rows (int64) of x as codes and factors: a program's part of `quantize_tokens`."""
    cols = group * GROUP + tl.arange(0, GROUP)
    mask = (rows < M)[:, None] & (cols < K)[None, :]
    x = tl.load(x_ptr + rows[:, None] * x_stride + cols[None, :], mask=mask, other=0.0).to(tl.float32)
    values, scale = round_to_fp8(x, FP8_MAX, INTERPRETED)
    tl.store(codes_ptr + rows[:, None] * K + cols[None, :], values.to(codes_ptr.dtype.element_ty), mask=mask)
    tl.store(scale_ptr + rows * num_groups + group, scale, mask=rows < M)


# A step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["M"])
def _quantize_tokens_kernel(
    x_ptr,
    codes_ptr,
    scale_ptr,
    M,
    K,
    num_groups,
    x_stride,
    FP8_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    round_tokens(
        x_ptr, codes_ptr, scale_ptr, rows, tl.program_id(1), M, K, num_groups, x_stride, FP8_MAX, GROUP, INTERPRETED
    )


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.gemm.quantize_tokens`; the arguments are taken as checked."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, cols = x.shape
    groups = cdiv(cols, GROUP)
    codes = torch.empty((rows, cols), dtype=FP8, device=x.device)
    scale = torch.empty((rows, groups), dtype=torch.float32, device=x.device)
    if codes.numel():
        require_fp8_units(x.device)
        tile = 1 if rows <= _ROWS_APART else _ROWS_TOGETHER
        _quantize_tokens_kernel[(cdiv(rows, tile), groups)](
            x,
            codes,
            scale,
            rows,
            cols,
            groups,
            x.stride(0),
            FP8_MAX=FP8_MAX,
            GROUP=GROUP,
            ROWS=tile,
            INTERPRETED=interpreting() and not x.is_cuda,
            num_warps=1 if tile == 1 else 4,
        )
    return codes, scale


@triton.jit(do_not_specialize=["M"])  # as above
def _block_fp8_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    x_scale_stride,
    w_stride,
    w_scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    A_FP8: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_FACTOR: tl.constexpr,
):
    # row tiles vary fastest: programs running together share a column tile of the weights
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    ks = tl.arange(0, BLOCK_K)
    acc, _ = scaled_product(
        x_ptr + rows[:, None] * x_stride + ks[None, :],
        rows < M,
        x_scale_ptr + rows * x_scale_stride,
        w_ptr + cols[None, :] * w_stride + ks[:, None],
        cols < N,
        w_scale_ptr + ((tl.program_id(1) * BLOCK_N if ONE_FACTOR else cols) // SCALE_N) * w_scale_stride,
        0,
        0,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP_K,
        SCALE_K,
        False,
        True,
        A_FP8,
        UPCAST,
        ONE_FACTOR,
    )
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def block_fp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, quantize_activations: bool
) -> torch.Tensor:
    """See `kernels.gemm.block_fp8_matmul`; the arguments are taken as checked."""
    M, N, K = x.shape[0], *weight.shape
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    scale_n, scale_k = block_size(weight, scale_inv)
    weight = weight_codes(weight if weight.stride(1) == 1 else weight.contiguous())
    scale_inv = scale_inv.contiguous()
    upcast = interpreting() and not x.is_cuda
    if quantize_activations:
        x, x_scale = quantize_tokens(x)
    else:
        x = x if x.stride(1) == 1 else x.contiguous()
        x_scale = scale_inv  # not read
    block_m = 16 if M <= 16 else 64
    block_k = min(128 if quantize_activations or block_m == 16 else 64, scale_k)
    _block_fp8_matmul_kernel[(cdiv(M, block_m), cdiv(N, 64))](
        x,
        x_scale,
        weight,
        scale_inv,
        out,
        M,
        N,
        K,
        x.stride(0),
        x_scale.stride(0),
        weight.stride(0),
        scale_inv.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK_K=block_k,
        GROUP_K=GROUP,
        SCALE_N=scale_n,
        SCALE_K=scale_k,
        A_FP8=quantize_activations,
        UPCAST=upcast,
        ONE_FACTOR=scale_n % 64 == 0,
        num_warps=4,
        num_stages=4,
    )
    return out
