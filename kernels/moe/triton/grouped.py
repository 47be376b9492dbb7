"""One of the two grouped products: every tile of pairs meets its expert's weights."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...dispatch import interpreting
from ...early import launch_options
from ...gemm.policy import weight_codes
from ...gemm.reference import FP8, FP8_MAX, GROUP, block_size
from ...gemm.triton import quantize_tokens, round_to_fp8, scaled_product
from ...gemm.triton_integer import integer_product, quantize_int8_tokens, step_of, stored_words
from ...integers import cdiv, next_power_of_2
from ..config import Tile
from .align import Tiles


# A step's number of pairs is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    w_zero_ptr,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    N,
    K,
    a_stride,
    a_scale_stride,
    w_stride_e,
    w_stride_n,
    w_scale_stride_e,
    w_scale_stride_n,
    second_offset,
    second_scale_offset,
    PAIRS_PER_ROW: tl.constexpr,
    SWIGLU: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_K: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    W_FP8: tl.constexpr,
    A_FP8: tl.constexpr,
    PACK: tl.constexpr,
    HAS_ZERO: tl.constexpr,
    A_INT8: tl.constexpr,
    UPCAST: tl.constexpr,
    ONE_FACTOR: tl.constexpr,
    OUT_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[p, n] = a[p // PAIRS_PER_ROW] . w[expert of p, n], or (SWIGLU) silu of it times the second product.

    OUT_FP8 rounds a tile's columns, which are one group of the next product's, as `quantize_tokens` does.
    PACK 0: weights of a's type or FP8 (`scaled_product`), else INT8 or INT4 (`integer_product`).
    """
    if EARLY:  # in this order: what the launches before wrote is then there for the next one, too
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    # column tiles vary fastest: the programs of one expert run together and share its rows in the L2 cache
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert >= 0:
        pairs = tl.load(pairs_ptr + tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        used = pairs < num_pairs
        rows = pairs // PAIRS_PER_ROW
        cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rows[:, None] * a_stride + ks[None, :]
        a_scale_ptrs = a_scale_ptr + rows * a_scale_stride
        w_rows = expert * w_stride_e + cols.to(tl.int64) * w_stride_n
        scaled = tl.program_id(0) * BLOCK_N if ONE_FACTOR else cols
        factors = expert * w_scale_stride_e + (scaled // SCALE_N) * w_scale_stride_n
        if PACK == 0:
            first, second = scaled_product(
                a_ptrs,
                used,
                a_scale_ptrs,
                w_ptr + w_rows[None, :] + ks[:, None],
                cols < N,
                w_scale_ptr + factors,
                second_offset,
                second_scale_offset,
                K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                GROUP_K,
                SCALE_K,
                SWIGLU,
                W_FP8,
                A_FP8,
                UPCAST,
                ONE_FACTOR,
            )
        else:
            first, second = integer_product(
                a_ptrs,
                used,
                a_scale_ptrs,
                w_ptr + w_rows[:, None] + tl.arange(0, BLOCK_K // PACK)[None, :],
                cols < N,
                w_scale_ptr + factors,
                w_zero_ptr + factors,
                second_offset,
                second_scale_offset,
                K,
                BLOCK_M,
                BLOCK_N,
                BLOCK_K,
                SCALE_K,
                SWIGLU,
                PACK,
                HAS_ZERO,
                A_INT8,
                UPCAST,
            )
        if SWIGLU:
            first = first * tl.sigmoid(first) * second
        mask = used[:, None] & (cols < N)[None, :]
        if OUT_FP8:
            first, factor = round_to_fp8(tl.where(mask, first, 0.0), FP8_MAX, UPCAST)
            tl.store(out_scale_ptr + pairs * tl.num_programs(0) + tl.program_id(0), factor, mask=used)
        tl.store(out_ptr + pairs[:, None] * N + cols[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)


def grouped_product(
    a: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor | None,
    zero: torch.Tensor | None,
    tiles: Tiles,
    tile: Tile,
    out: torch.Tensor,
    *,
    pairs_per_row: int,
    swiglu: bool,
    quantize: bool,
    a_scale: torch.Tensor | None = None,
    out_scale: torch.Tensor | None = None,
    early: bool = False,
) -> None:
    """Fill out [pairs, N] from a [pairs / pairs_per_row, K] and weight [E, N or 2N, K].

    a may be FP8 codes already, with a_scale; out may take some, with a factor a column tile in out_scale.
    """
    num_pairs, N = out.shape
    block_n = max(16, min(tile.block_n, next_power_of_2(N)))
    block_k = max(32 if quantize else 16, min(tile.block_k, next_power_of_2(a.shape[1])))
    scale_n, scale_k, second_scale, pack, fp8 = GROUP, GROUP, 0, 0, False
    if scale is not None:
        scale = scale.contiguous()
        blocks = scale.shape[1] // 2 if swiglu else scale.shape[1]
        second_scale, fp8 = blocks * scale.stride(1), weight.dtype is FP8
        if fp8:
            weight = weight_codes(weight)
            scale_n, scale_k = block_size(weight[:, :N], scale[:, :blocks])
            block_k = min(block_k, scale_k, GROUP if quantize else block_k)
        else:
            scale_n, (block_k, scale_k) = 1, step_of(weight, scale, tile.block_k, a.shape[1])
            weight, pack = stored_words(weight)
    upcast = interpreting() and not a.is_cuda
    if quantize and a_scale is None:
        a, a_scale = quantize_tokens(a) if fp8 else quantize_int8_tokens(a)
    elif a_scale is None:
        a_scale = a  # not read
    _grouped_kernel[(cdiv(N, block_n), tiles.max_tiles)](
        a,
        a_scale,
        weight,
        a if scale is None else scale,
        a if zero is None else zero.contiguous(),
        out,
        out if out_scale is None else out_scale,
        tiles.pairs,
        tiles.experts,
        num_pairs,
        N,
        a.shape[1],
        a.stride(0),
        a_scale.stride(0),
        weight.stride(0),
        weight.stride(1),
        0 if scale is None else scale.stride(0),
        0 if scale is None else scale.stride(1),
        N * weight.stride(1),
        second_scale,
        PAIRS_PER_ROW=pairs_per_row,
        SWIGLU=swiglu,
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        GROUP_K=GROUP,
        SCALE_N=scale_n,
        SCALE_K=scale_k,
        W_FP8=fp8,
        A_FP8=quantize and fp8,
        PACK=pack,
        HAS_ZERO=zero is not None,
        A_INT8=quantize and not fp8,
        UPCAST=upcast,
        ONE_FACTOR=fp8 and scale_n % block_n == 0,
        OUT_FP8=out_scale is not None,
        FP8_MAX=FP8_MAX,
        EARLY=early,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **launch_options(early),
    )
