"""The second of the two grouped products where FP8 rows are short, as in a share of the experts.

A program of `grouped` that has one or two steps to go spends its time on its way to the first of them: it must know its
expert, then its pairs, then their inputs. Here a program goes through several tiles of its expert's columns, whose
weights are on their way while it multiplies, and rounds its inputs itself, once.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...dispatch import interpreting
from ...early import launch_options
from ...gemm.policy import weight_codes
from ...gemm.reference import FP8, FP8_MAX, GROUP, block_size
from ...gemm.triton import round_to_fp8
from .align import Tiles

MOST_COLUMNS = GROUP  # of a row of weights: its inputs have one factor
_BLOCK_M = 16  # of the tiles that an H200 was quicker with; higher ones meet products of other kinds
_WALKS = 4  # programs that share an expert's columns
_COLUMNS = 128  # of them at a time


# A step's number of pairs is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def _walking_kernel(
    a_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    N,
    w_stride_e,
    w_stride_n,
    w_scale_stride_e,
    w_scale_stride_n,
    K: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    SCALE_N: tl.constexpr,
    STAGES: tl.constexpr,
    FP8_MAX: tl.constexpr,
    UPCAST: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[p, n] = a[p] . w[expert of p, n], of rows with K columns and a rounded as `quantize_tokens` does."""
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert >= 0:
        pairs = tl.load(pairs_ptr + tile.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
        used = pairs < num_pairs
        ks = tl.arange(0, K)
        a = tl.load(a_ptr + pairs[:, None] * K + ks[None, :], mask=used[:, None], other=0.0).to(tl.float32)
        a, factors = round_to_fp8(a, FP8_MAX, UPCAST)
        if not UPCAST:
            a = a.to(tl.float8e4nv)
        first = tl.program_id(0) * (TILES * BLOCK_N)
        cols = first + tl.arange(0, BLOCK_N)
        w_ptrs = w_ptr + expert * w_stride_e + cols.to(tl.int64)[None, :] * w_stride_n + ks[:, None]
        out_ptrs = out_ptr + pairs[:, None] * N + cols[None, :]
        for n in tl.range(0, TILES * BLOCK_N, BLOCK_N, num_stages=STAGES):
            w = tl.load(w_ptrs + n * w_stride_n)
            if UPCAST:
                w = w.to(tl.float32)
            scale = tl.load(w_scale_ptr + expert * w_scale_stride_e + (first + n) // SCALE_N * w_scale_stride_n)
            total = tl.dot(a, w, input_precision="ieee") * (factors[:, None] * scale)
            tl.store(out_ptrs + n, total.to(out_ptr.dtype.element_ty), mask=used[:, None])


def _block_n(weight: torch.Tensor, scale: torch.Tensor) -> int:
    return min(_COLUMNS, block_size(weight, scale)[0])


def walks(weight: torch.Tensor, scale: torch.Tensor | None, quantize: bool, block_m: int) -> bool:
    """Whether `walking_product` is for these weights [E, N, K] and tiles of so many pairs.

    FP8 on both sides, short rows of whole groups and factors, and columns that can be shared evenly.
    """
    _, N, K = weight.shape
    if scale is None or weight.dtype is not FP8 or not quantize or block_m != _BLOCK_M:
        return False
    if K > MOST_COLUMNS or K < 32 or K & (K - 1) or block_size(weight, scale)[1] < K:
        return False
    return N % (_WALKS * _block_n(weight, scale)) == 0


def walking_product(
    a: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, tiles: Tiles, out: torch.Tensor, early: bool
) -> None:
    """Fill out [pairs, N] from a [pairs, K] and FP8 weight [E, N, K] with factors of blocks, where `walks` says so."""
    (num_pairs, N), K, block_n = out.shape, a.shape[1], _block_n(weight, scale)
    scale_n, _ = block_size(weight, scale)
    scale, weight = scale.contiguous(), weight_codes(weight)
    _walking_kernel[(_WALKS, tiles.max_tiles)](
        a,
        weight,
        scale,
        out,
        tiles.pairs,
        tiles.experts,
        num_pairs,
        N,
        weight.stride(0),
        weight.stride(1),
        scale.stride(0),
        scale.stride(1),
        K=K,
        TILES=N // (_WALKS * block_n),
        BLOCK_M=tiles.block_m,
        BLOCK_N=block_n,
        SCALE_N=scale_n,
        STAGES=3,
        FP8_MAX=FP8_MAX,
        UPCAST=interpreting() and not a.is_cuda,
        EARLY=early,
        num_warps=4,
        **launch_options(early),
    )
