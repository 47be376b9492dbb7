"""The mixture of experts for a few tokens, in two launches: nothing is sorted, and nothing is multiplied by matrices.

With so few tokens hardly two of them share an expert, so each pair (token, choice) reads its expert's rows for a vector
product. The second launch sums a token's choices in registers, in their order: no atomics, and equal inputs give equal
bits. Weights are widened as they are read; their factors go into the vector that they meet, which is far shorter.
"""

import torch
import triton
import triton.language as tl

from ...gemm.policy import weight_codes
from ...gemm.reference import GROUP, block_size
from ...gemm.triton import widened
from ...integers import cdiv, next_power_of_2

_ROWS = 16  # of a weight matrix in one program: at one token, 350 programs for gate and up, 128 for down
_DEPTH = 256  # columns of them loaded at once by gate and up
_LANES = 2048  # columns of several choices' down matrices loaded at once


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
        ks = tl.arange(0, BLOCK_K)
        gate_ptrs = weight_ptr + expert * weight_stride_e + cols[:, None] * weight_stride_n + ks[None, :]
        up_ptrs = gate_ptrs + inner * weight_stride_n
        scale_ptr += expert * scale_stride_e + (first // SCALE_N) * scale_stride_n
        gate = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        up = tl.zeros([BLOCK_N, BLOCK_K], dtype=tl.float32)
        for k in range(0, K, BLOCK_K):
            inside = ks < K - k
            mask = (cols < inner)[:, None] & inside[None, :]
            gate_rows = tl.load(gate_ptrs + k, mask=mask, other=0.0)
            up_rows = tl.load(up_ptrs + k, mask=mask, other=0.0)
            for_gate = tl.load(x_ptr + token * x_stride + k + ks, mask=inside, other=0.0).to(tl.float32)
            for_up = for_gate
            if SCALED:
                factors = scale_ptr + (k + ks) // SCALE_K
                for_gate = for_gate * tl.load(factors, mask=inside, other=0.0)
                for_up = for_up * tl.load(factors + up_scale_offset, mask=inside, other=0.0)
            gate += widened(gate_rows) * for_gate[None, :]
            up += widened(up_rows) * for_up[None, :]
        gated = tl.sum(gate, axis=1)
        gated = gated * tl.sigmoid(gated) * tl.sum(up, axis=1)
        tl.store(out_ptr + pair.to(tl.int64) * inner + cols, gated, mask=cols < inner)


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
    SCALE_N: tl.constexpr,
    SCALE_K: tl.constexpr,
    SCALED: tl.constexpr,
):
    """out[token, h] = sum over a token's choices of its weight times (row h of the expert . gated[pair])."""
    token = tl.program_id(1).to(tl.int64)
    first = tl.program_id(0) * BLOCK_N
    rows = first + tl.arange(0, BLOCK_N)
    lanes = tl.arange(0, BLOCK_C * BLOCK_I)
    column = lanes % BLOCK_I
    total = tl.zeros([BLOCK_N, BLOCK_C * BLOCK_I], dtype=tl.float32)
    for begin in tl.static_range(0, CHOICES, BLOCK_C):
        choice = begin + lanes // BLOCK_I
        expert = tl.load(ids_ptr + token * ids_stride + choice, mask=choice < CHOICES, other=-1).to(tl.int64)
        held = (expert >= 0) & (expert < num_experts) & (column < inner)  # the other pairs were never written
        expert = tl.maximum(expert, 0)  # not where(held, ...): Triton 3.7.1 then breaks its own program
        down_rows = tl.load(
            weight_ptr + expert[None, :] * weight_stride_e + rows[:, None] * weight_stride_n + column[None, :],
            mask=held[None, :] & (rows < H)[:, None],
            other=0.0,
        )
        gated = tl.load(gated_ptr + (token * CHOICES + choice) * inner + column, mask=held, other=0.0)
        gated *= tl.load(topk_weights_ptr + token * topk_stride + choice, mask=held, other=0.0).to(tl.float32)
        if SCALED:
            factors = scale_ptr + expert * scale_stride_e + (first // SCALE_N) * scale_stride_n + column // SCALE_K
            gated *= tl.load(factors, mask=held, other=0.0)
        total += widened(down_rows) * gated[None, :]
    result = tl.sum(total, axis=1)
    tl.store(out_ptr + token * H + rows, result.to(out_ptr.dtype.element_ty), mask=rows < H)


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
    gated = torch.empty((tokens * choices, inner), dtype=torch.float32, device=x.device)
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
    block_n = min(_ROWS, rows13)
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
        BLOCK_K=min(_DEPTH, next_power_of_2(hidden)),
        SCALE_N=rows13,
        SCALE_K=depth13,
        SCALED=scaled,
        num_warps=4,
    )
    block_n, block_i = min(_ROWS, rows2), next_power_of_2(inner)
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
        BLOCK_C=max(1, min(next_power_of_2(choices), _LANES // block_i)),
        BLOCK_I=block_i,
        SCALE_N=rows2,
        SCALE_K=depth2,
        SCALED=scaled,
        num_warps=8,
    )
    return out
