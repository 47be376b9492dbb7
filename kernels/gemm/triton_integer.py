"""Products with INT4 and INT8 weights in Triton. `integer_product` is also the core of the mixture of experts.

Weights are widened to the activations' type in registers, which is exact: code - zero has at most 5 bits (INT4) or 8.
The factors are applied to the float32 partial sums wherever a step of the loop lies within one group.
"""

import math

import torch
import triton
import triton.language as tl

from ..dispatch import interpreting
from ..integers import cdiv, next_power_of_2
from .formats import INT4, group_of
from .policy import require_integer_products

WORD = 8  # INT4 codes in the 32-bit words that the kernel reads
_LEAST_STEP = 32  # columns; where groups end within so many, factors are applied to each weight (and take registers)


@triton.jit
def _widened_half(words, place: tl.constexpr, zero, BF16: tl.constexpr):
    """Columns `place` and `place + 4` of each word of eight INT4 codes, less zero, exact in 16 bits.

    A code becomes the low mantissa bits of 128 (bfloat16) or 1024 (float16); two codes need one mask and one or.
    """
    HALF: tl.constexpr = tl.bfloat16 if BF16 else tl.float16
    both = ((words >> (4 * place)) & 0x000F000F) | (0x43004300 if BF16 else 0x64006400)
    offset = (zero + (128.0 if BF16 else 1024.0)).to(HALF)
    low = both.to(tl.int16).to(HALF, bitcast=True) - offset
    high = (both >> 16).to(tl.int16).to(HALF, bitcast=True) - offset
    return low, high


@triton.jit
def _widened_int4(words, zero, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BF16: tl.constexpr):
    """code - zero of words [BLOCK_N, BLOCK_K / 8], columns in order, as bfloat16 or float16 [BLOCK_N, BLOCK_K]."""
    k0, k4 = _widened_half(words, 0, zero, BF16)
    k1, k5 = _widened_half(words, 1, zero, BF16)
    k2, k6 = _widened_half(words, 2, zero, BF16)
    k3, k7 = _widened_half(words, 3, zero, BF16)
    # the last join is the lowest bit of the column: even | odd, of each of those in the same way
    even = tl.join(tl.join(k0, k4), tl.join(k2, k6))
    odd = tl.join(tl.join(k1, k5), tl.join(k3, k7))
    return tl.join(even, odd).reshape(BLOCK_N, BLOCK_K)


@triton.jit
def _widened_int8(codes):
    """float32 of int8 codes: the low mantissa bits of 2**23, without the conversions that Ampere does slowly."""
    bits = (codes.to(tl.uint8, bitcast=True).to(tl.int32)) ^ 0x4B000080
    return bits.to(tl.float32, bitcast=True) - 8388736.0


@triton.jit
def _add_step(
    total,
    a,
    w_ptrs,
    w_mask,
    scale_ptrs,
    zero_ptrs,
    k,
    K,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    BF16: tl.constexpr,
):
    """total + the product of a [BLOCK_M, BLOCK_K] with one step of the weights, see `integer_product`."""
    inside = tl.arange(0, BLOCK_K // PACK) < (K - k) // PACK
    w = tl.load(w_ptrs + k // PACK, mask=w_mask[:, None] & inside[None, :], other=0)
    if a.dtype == tl.int8:
        total = tl.dot(a, w.trans(), total, out_dtype=tl.int32)
    else:
        EACH: tl.constexpr = GROUP != 0 and GROUP % BLOCK_K != 0
        place = 0
        if GROUP != 0:
            place = k // GROUP
        if EACH:
            ks = k + tl.arange(0, BLOCK_K)
            where = (ks // GROUP)[None, :]
            held = w_mask[:, None] & (ks < K)[None, :]
        if PACK == 8:
            zero = tl.full([BLOCK_N, 1], 0.0 if EACH else 8.0, dtype=tl.float32)
            if HAS_ZERO and not EACH:
                zero = tl.load(zero_ptrs + place, mask=w_mask, other=0).to(tl.float32)[:, None]
            values = _widened_int4(w, zero, BLOCK_N, BLOCK_K, BF16)
            if EACH:
                zeros = tl.full([BLOCK_N, BLOCK_K], 8.0, dtype=tl.float32)
                if HAS_ZERO:
                    zeros = tl.load(zero_ptrs[:, None] + where, mask=held, other=0).to(tl.float32)
                values = values.to(tl.float32) - zeros
        else:
            values = _widened_int8(w)
        if EACH:
            values *= tl.load(scale_ptrs[:, None] + where, mask=held, other=0.0).to(tl.float32)
        values = values.to(a.dtype).trans()
        if GROUP == 0 or EACH:
            total = tl.dot(a, values, total, input_precision="ieee")
        else:
            factor = tl.load(scale_ptrs + place, mask=w_mask, other=0.0).to(tl.float32)[None, :]
            total += tl.dot(a, values, input_precision="ieee") * factor
    return total


@triton.jit
def integer_product(
    a_ptrs,
    a_mask,
    a_scale_ptrs,
    w_ptrs,
    w_mask,
    scale_ptrs,
    zero_ptrs,
    second_offset,
    second_scale_offset,
    K,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    DUAL: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    A_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One tile of a @ ((code - zero) * scale).T in float32, and (DUAL) a second one with other rows, reading `a` once.

    a_ptrs [BLOCK_M, BLOCK_K]; w_ptrs [BLOCK_N, BLOCK_K / PACK] at 32-bit words of eight INT4 codes (PACK 8) or at INT8
    codes (PACK 1), K being stored contiguously; scale_ptrs and (HAS_ZERO) zero_ptrs [BLOCK_N] at each row's first
    group. The second tile lies `second_offset` and, in scales and zeros, `second_scale_offset` further on. GROUP
    columns share a factor, 0: all of a row. A_INT8: `a` holds INT8 codes with a factor a row (a_scale_ptrs [BLOCK_M]),
    products are summed in int32, GROUP is 0. UPCAST multiplies in float32, for the interpreter, which cannot do
    arithmetic in bf16.
    """
    ks = tl.arange(0, BLOCK_K)
    BF16: tl.constexpr = a_ptrs.dtype.element_ty == tl.bfloat16 and not UPCAST
    first = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if A_INT8 else tl.float32)
    second = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if A_INT8 else tl.float32)
    for k in range(0, K, BLOCK_K):
        a = tl.load(a_ptrs + k, mask=a_mask[:, None] & (ks < K - k)[None, :], other=0)
        if UPCAST and not A_INT8:
            a = a.to(tl.float32)
        first = _add_step(
            first, a, w_ptrs, w_mask, scale_ptrs, zero_ptrs, k, K, BLOCK_N, BLOCK_K, GROUP, PACK, HAS_ZERO, BF16
        )
        if DUAL:
            second = _add_step(
                second, a, w_ptrs + second_offset, w_mask, scale_ptrs + second_scale_offset,
                zero_ptrs + second_scale_offset, k, K, BLOCK_N, BLOCK_K, GROUP, PACK, HAS_ZERO, BF16,
            )  # fmt: skip
    if GROUP == 0:
        rows = 1.0
        if A_INT8:
            rows = tl.load(a_scale_ptrs, mask=a_mask, other=0.0)[:, None]
        first = first.to(tl.float32) * rows * tl.load(scale_ptrs, mask=w_mask, other=0.0).to(tl.float32)[None, :]
        if DUAL:
            factor = tl.load(scale_ptrs + second_scale_offset, mask=w_mask, other=0.0).to(tl.float32)
            second = second.to(tl.float32) * rows * factor[None, :]
    return first, second


@triton.jit
def _quantize_int8_tokens_kernel(x_ptr, codes_ptr, scale_ptr, K, x_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    peak = tl.zeros([BLOCK], dtype=tl.float32)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * x_stride + k + cols, mask=cols < K - k, other=0.0).to(tl.float32)
        peak = tl.maximum(peak, tl.abs(x))
    most = tl.max(peak, axis=0)
    scale = tl.where(most > 0, tl.div_rn(most, 127.0), 1.0)
    for k in range(0, K, BLOCK):
        x = tl.load(x_ptr + row * x_stride + k + cols, mask=cols < K - k, other=0.0).to(tl.float32)
        steps = tl.div_rn(x, tl.zeros([BLOCK], dtype=tl.float32) + scale)
        codes = (steps + 12582912.0) - 12582912.0  # 1.5 * 2**23 leaves whole numbers, halves rounded to even
        codes = tl.minimum(tl.maximum(codes, -127.0), 127.0)
        tl.store(codes_ptr + row * K + k + cols, codes.to(tl.int8), mask=cols < K - k)
    tl.store(scale_ptr + row, scale)


def quantize_int8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [M, K] -> (int8 [M, K], scale float32 [M, 1]): see `integer.quantize_int8_tokens`."""
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, cols = x.shape
    codes = torch.empty((rows, cols), dtype=torch.int8, device=x.device)
    scale = torch.empty((rows, 1), dtype=torch.float32, device=x.device)
    if codes.numel():
        block = min(1024, next_power_of_2(cols))
        _quantize_int8_tokens_kernel[(rows,)](x, codes, scale, cols, x.stride(0), BLOCK=block, num_warps=4)
    return codes, scale


def stored_words(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
    """A weight as the kernel reads it, and its codes an element: INT4 as 32-bit words, INT8 as it is.

    Its last dimension is made contiguous where it is not. Raises ValueError for a GPU without bf16 tensor cores.
    """
    require_integer_products(weight.device)
    weight = weight if weight.stride(-1) == 1 else weight.contiguous()
    if weight.dtype is not INT4:
        return weight, 1
    whole = weight.storage_offset() % 4 == 0 and all(stride % 4 == 0 for stride in weight.stride()[:-1])
    return (weight if whole else weight.clone(memory_format=torch.contiguous_format)).view(torch.int32), WORD


def step_of(weight: torch.Tensor, scale: torch.Tensor, wanted: int, columns: int) -> tuple[int, int]:
    """(BLOCK_K, GROUP) for `integer_product` where a step of `wanted` columns, a power of two, would be liked."""
    wanted = max(_LEAST_STEP, min(wanted, next_power_of_2(columns)))
    if scale.shape[-1] == 1:
        return wanted, 0
    group = group_of(weight, scale)
    within = math.gcd(group, wanted)
    return max(within, _LEAST_STEP), group


# A step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["M"])
def _quantized_matmul_kernel(
    x_ptr,
    x_scale_ptr,
    w_ptr,
    scale_ptr,
    zero_ptr,
    out_ptr,
    M,
    N,
    K,
    x_stride,
    w_stride,
    scale_stride,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    A_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # row tiles vary fastest: programs running together share a column tile of the weights
    rows = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(1).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    acc, _ = integer_product(
        x_ptr + rows[:, None] * x_stride + tl.arange(0, BLOCK_K)[None, :],
        rows < M,
        x_scale_ptr + rows,
        w_ptr + cols[:, None] * w_stride + tl.arange(0, BLOCK_K // PACK)[None, :],
        cols < N,
        scale_ptr + cols * scale_stride,
        zero_ptr + cols * scale_stride,
        0,
        0,
        K,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        GROUP,
        False,
        PACK,
        HAS_ZERO,
        A_INT8,
        UPCAST,
    )
    mask = (rows < M)[:, None] & (cols < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + cols[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def quantized_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, quantize_activations: bool
) -> torch.Tensor:
    """See `kernels.gemm.quantized_matmul`; the arguments are taken as checked."""
    (M, K), N = x.shape, weight.shape[0]
    out = torch.empty((M, N), dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    block_m = 16 if M <= 16 else 64
    block_k, group = step_of(weight, scale, 128 if block_m == 16 or quantize_activations else 64, K)
    weight, pack = stored_words(weight)
    scale, zero = scale.contiguous(), None if zero is None else zero.contiguous()
    x_scale = scale  # not read
    if quantize_activations:
        x, x_scale = quantize_int8_tokens(x)
    else:
        x = x if x.stride(1) == 1 else x.contiguous()
    _quantized_matmul_kernel[(cdiv(M, block_m), cdiv(N, 64))](
        x,
        x_scale,
        weight,
        scale,
        scale if zero is None else zero,
        out,
        M,
        N,
        K,
        x.stride(0),
        weight.stride(0),
        scale.stride(0),
        BLOCK_M=block_m,
        BLOCK_N=64,
        BLOCK_K=block_k,
        GROUP=group,
        PACK=pack,
        HAS_ZERO=zero is not None,
        A_INT8=quantize_activations,
        UPCAST=interpreting() and not x.is_cuda,
        num_warps=4,
        num_stages=4,
    )
    return out
