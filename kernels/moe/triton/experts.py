"""The mixture of experts in Triton: sort pairs by expert, gate-up product with SwiGLU, down product, weighted sum. A
few tokens take a shorter way (`few`).

All intermediate results are indexed by pair (token, choice), so every value is written once, by one program, and summed
in the order of the choices: no atomics, and equal inputs give equal bits. Nothing is read back to the host and every
grid follows from shapes alone, so a CUDA graph can hold it.
"""

import torch
import triton
import triton.language as tl

from ...dispatch import interpreting
from ...gemm.policy import weight_codes
from ...gemm.reference import FP8, GROUP, block_size
from ...gemm.triton import quantize_tokens, scaled_product
from ...gemm.triton_integer import integer_product, quantize_int8_tokens, step_of, stored_words
from ..config import Tile
from ..ways import choose_way
from .align import Tiles, align
from .few import fused_moe_few


# A step's number of pairs is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def _grouped_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    w_zero_ptr,
    out_ptr,
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
):
    """out[p, n] = a[p // PAIRS_PER_ROW] . w[expert of p, n], or (SWIGLU) silu of it times the second product.

    PACK 0: weights of a's type or FP8 (`scaled_product`), else INT8 or INT4 (`integer_product`).
    """
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
        factors = expert * w_scale_stride_e + (cols // SCALE_N) * w_scale_stride_n
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
        tl.store(out_ptr + pairs[:, None] * N + cols[None, :], first.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _weighted_sum_kernel(
    values_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    H,
    num_experts,
    weights_stride,
    ids_stride,
    TOP_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for choice in range(TOP_K):
        expert = tl.load(ids_ptr + token * ids_stride + choice)
        weight = tl.load(weights_ptr + token * weights_stride + choice).to(tl.float32)
        held = (expert >= 0) & (expert < num_experts)  # rows of skipped pairs were never written
        limit = tl.where(held, H, 0)
        value = tl.load(values_ptr + (token * TOP_K + choice) * H + cols, mask=cols < limit, other=0.0)
        total += tl.where(held, weight, 0.0) * value.to(tl.float32)
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=cols < H)


def _grouped(
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
) -> None:
    """Fill out [pairs, N] from a [pairs / pairs_per_row, K] and weight [E, N or 2N, K]."""
    num_pairs, N = out.shape
    block_n = max(16, min(tile.block_n, triton.next_power_of_2(N)))
    block_k = max(32 if quantize else 16, min(tile.block_k, triton.next_power_of_2(a.shape[1])))
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
    if quantize:
        a, a_scale = quantize_tokens(a) if fp8 else quantize_int8_tokens(a)
    else:
        a_scale = a  # not read
    _grouped_kernel[(triton.cdiv(N, block_n), tiles.max_tiles)](
        a,
        a_scale,
        weight,
        a if scale is None else scale,
        a if zero is None else zero.contiguous(),
        out,
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
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    quantize_activations: bool | None,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
    num_shared: int = 0,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; the arguments are taken as checked."""
    for weight in (w13, w2):
        if weight.stride(2) != 1:
            raise ValueError(
                f"fused_moe: expert weights {list(weight.shape)} have strides {weight.stride()}; the last must be 1"
            )
    (tokens, hidden), top_k, num_experts, inner = x.shape, topk_ids.shape[1], w2.shape[0], w13.shape[1] // 2
    if topk_ids.numel() == 0 or num_experts == 0:
        return x.new_zeros(x.shape)
    x = x if x.stride(1) == 1 else x.contiguous()
    topk_weights, topk_ids = (t if t.stride(1) == 1 else t.contiguous() for t in (topk_weights, topk_ids))
    way = choose_way(tokens, top_k, x.element_size(), w13, w13_scale, quantize_activations, num_shared)
    config = way.config
    if config is None:
        return fused_moe_few(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)
    tiles = align(topk_ids, num_experts, config.block_m)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    activated = x.new_empty((tokens * top_k, inner))
    values = x.new_empty((tokens * top_k, hidden))
    _grouped(
        x, w13, w13_scale, w13_zero, tiles, config.gate_up, activated,
        pairs_per_row=top_k, swiglu=True, quantize=way.quantize,
    )  # fmt: skip
    _grouped(
        activated, w2, w2_scale, w2_zero, tiles, config.down, values,
        pairs_per_row=1, swiglu=False, quantize=way.quantize,
    )  # fmt: skip
    block = min(1024, triton.next_power_of_2(hidden))
    _weighted_sum_kernel[(tokens, triton.cdiv(hidden, block))](
        values,
        topk_weights,
        topk_ids,
        out,
        hidden,
        num_experts,
        topk_weights.stride(0),
        topk_ids.stride(0),
        TOP_K=top_k,
        BLOCK_H=block,
    )
    return out
