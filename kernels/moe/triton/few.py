"""The mixture of experts for a few tokens, in two launches: nothing is sorted, and nothing is multiplied by matrices.

With so few tokens hardly two of them share an expert, so each pair (token, choice) reads its expert's rows for vector
products. A program holds few rows, but whole ones (down: of all of a token's choices): it asks for all of its weights
at once, and no load waits for another one. The second launch sums a token's choices in registers, in their order: no
atomics, and equal inputs give equal bits. Weights are widened in registers; their factors are applied to sums of what
lies together in a thread.
"""

import torch
import triton
import triton.language as tl

from ...gemm.policy import weight_codes
from ...gemm.reference import GROUP, block_size
from ...gemm.triton import widened
from ...integers import cdiv, next_power_of_2

_ROWS = 4  # of a weight matrix in one program, at most: at one token of 11 choices 1,408 programs, then 512
_GATE_UP_WARPS, _DOWN_WARPS = 4, 8
_LOAD_BYTES = 16  # that a thread takes at once
_THREAD_BYTES = 256  # of weights that it holds, at most: 64 registers


@triton.jit
def _gate_up_kernel(
    x_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    out_ptr,
    num_experts,
    inner,
    K,
    x_stride,
    ids_stride,
    weight_stride_e,
    weight_stride_n,
    scale_stride_e,
    scale_stride_n,
    up_scale_offset,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out[pair, i] = silu(gate row i . x) * (up row i . x); a pair without an expert here is left as it was."""
    pair = tl.program_id(1)
    token = (pair // CHOICES).to(tl.int64)
    expert = tl.load(ids_ptr + token * ids_stride + pair % CHOICES).to(tl.int64)
    if (expert >= 0) & (expert < num_experts):
        first = tl.program_id(0) * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
        ks = begins[:, None] + tl.arange(0, LOAD)[None, :]
        gate_ptrs = weight_ptr + expert * weight_stride_e + cols[:, None, None] * weight_stride_n + ks[None]
        scale_ptr += expert * scale_stride_e + (first // SCALE_N) * scale_stride_n
        mask = (cols < inner)[:, None, None] & (ks < K)[None]
        gate_rows = tl.load(gate_ptrs, mask=mask, other=0.0, eviction_policy="evict_first")
        up_rows = tl.load(gate_ptrs + inner * weight_stride_n, mask=mask, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_ptr + token * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
        gate = tl.sum(widened(gate_rows) * x[None], axis=2)
        up = tl.sum(widened(up_rows) * x[None], axis=2)
        if SCALED:
            factors = scale_ptr + begins // SCALE_K
            gate *= tl.load(factors, mask=begins < K, other=0.0)[None]
            up *= tl.load(factors + up_scale_offset, mask=begins < K, other=0.0)[None]
        gated = tl.sum(gate, axis=1)
        gated = gated * tl.sigmoid(gated) * tl.sum(up, axis=1)
        tl.store(out_ptr + pair.to(tl.int64) * inner + cols, gated.to(out_ptr.dtype.element_ty), mask=cols < inner)


@triton.jit
def _down_kernel(
    gated_ptr,
    weight_ptr,
    scale_ptr,
    ids_ptr,
    topk_weights_ptr,
    out_ptr,
    num_experts,
    H,
    inner,
    ids_stride,
    topk_stride,
    weight_stride_e,
    weight_stride_n,
    scale_stride_e,
    scale_stride_n,
    CHOICES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    LOAD: tl.constexpr,
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out[token, h] = sum over a token's choices of its weight times (row h of the expert . gated[pair])."""
    token = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    groups = tl.arange(0, BLOCK_C * BLOCK_I // LOAD)  # of columns that lie together in a thread, choice by choice
    choice = groups // (BLOCK_I // LOAD)
    begins = groups % (BLOCK_I // LOAD) * LOAD
    columns = begins[:, None] + tl.arange(0, LOAD)[None, :]
    expert = tl.load(ids_ptr + token * ids_stride + choice, mask=choice < CHOICES, other=-1).to(tl.int64)
    held = (expert >= 0) & (expert < num_experts)  # the other pairs were never written
    expert = tl.maximum(expert, 0)  # not where(held, ...): Triton 3.7.1 then breaks its own program
    inside = held[:, None] & (columns < inner)
    places = (expert * weight_stride_e)[:, None] + columns
    down_rows = tl.load(
        weight_ptr + places[None] + (rows * weight_stride_n)[:, None, None],
        mask=inside[None] & (rows < H)[:, None, None],
        other=0.0,
        eviction_policy="evict_first",
    )
    factor = tl.load(topk_weights_ptr + token * topk_stride + choice, mask=held, other=0.0).to(tl.float32)
    if SCALED:
        factors = scale_ptr + expert * scale_stride_e + (first // SCALE_N) * scale_stride_n + begins // SCALE_K
        factor *= tl.load(factors, mask=held & (begins < inner), other=0.0)
    gated = tl.load(gated_ptr + (token * CHOICES + choice)[:, None] * inner + columns, mask=inside, other=0.0)
    sums = tl.sum(widened(down_rows) * gated.to(tl.float32)[None], axis=2) * factor[None]
    result = tl.sum(sums, axis=1)
    tl.store(out_ptr + token * H + rows, result.to(out_ptr.dtype.element_ty), mask=rows < H)


def _rows(columns: int, element_size: int, block_rows: int, num_warps: int) -> int:
    """Rows of so many columns for a program: as many as its threads can hold, within one block of factors."""
    rows = min(_ROWS, block_rows)
    while rows > 1 and rows * columns * element_size > 32 * num_warps * _THREAD_BYTES:
        rows //= 2
    return rows


def fused_moe_few(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; activations stay in their dtype, last strides are 1, some pair is there."""
    (tokens, hidden), choices, (num_experts, _, inner) = x.shape, topk_ids.shape[1], w2.shape
    gated = torch.empty((tokens * choices, inner), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    scaled = w13_scale is not None
    up_offset, rows13, depth13, rows2, depth2 = 0, GROUP, GROUP, GROUP, GROUP
    scale_strides13: tuple[int, ...] = (0, 0)
    scale_strides2: tuple[int, ...] = (0, 0)
    if w13_scale is not None and w2_scale is not None:
        w13_scale, w2_scale = w13_scale.contiguous(), w2_scale.contiguous()
        blocks = w13_scale.shape[1] // 2
        rows13, depth13 = block_size(w13[:, :inner], w13_scale[:, :blocks])
        rows2, depth2 = block_size(w2, w2_scale)
        up_offset = blocks * w13_scale.stride(1)
        scale_strides13, scale_strides2 = w13_scale.stride()[:2], w2_scale.stride()[:2]
        w13, w2 = weight_codes(w13), weight_codes(w2)
    size = w13.element_size()
    load = _LOAD_BYTES // size
    block_k = max(load, next_power_of_2(hidden))
    block_n = _rows(2 * block_k, size, rows13, _GATE_UP_WARPS)
    _gate_up_kernel[(cdiv(inner, block_n), tokens * choices)](
        x,
        w13,
        x if w13_scale is None else w13_scale,
        topk_ids,
        gated,
        num_experts,
        inner,
        hidden,
        x.stride(0),
        topk_ids.stride(0),
        w13.stride(0),
        w13.stride(1),
        *scale_strides13,
        up_offset,
        CHOICES=choices,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        LOAD=min(load, depth13),
        SCALE_N=rows13,
        SCALE_K=depth13,
        SCALED=scaled,
        num_warps=_GATE_UP_WARPS,
    )
    block_c, block_i = next_power_of_2(choices), max(load, next_power_of_2(inner))
    block_n = _rows(block_c * block_i, size, rows2, _DOWN_WARPS)
    _down_kernel[(cdiv(hidden, block_n), tokens)](
        gated,
        w2,
        x if w2_scale is None else w2_scale,
        topk_ids,
        topk_weights,
        out,
        num_experts,
        hidden,
        inner,
        topk_ids.stride(0),
        topk_weights.stride(0),
        w2.stride(0),
        w2.stride(1),
        *scale_strides2,
        CHOICES=choices,
        BLOCK_N=block_n,
        BLOCK_C=block_c,
        BLOCK_I=block_i,
        LOAD=min(load, depth2),
        SCALE_N=rows2,
        SCALE_K=depth2,
        SCALED=scaled,
        num_warps=_DOWN_WARPS,
    )
    return out
