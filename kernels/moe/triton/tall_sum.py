"""The weighted sum with the shared expert's down product in it: its rows never go through memory."""

import torch
import triton
import triton.language as tl

from ...dispatch import interpreting
from ...gemm.policy import weight_codes
from ...gemm.reference import GROUP
from ...integers import cdiv


@triton.jit(do_not_specialize=["tokens"])  # a step's number of tokens: a new one compiles nothing
def _shared_sum_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    values_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    tokens,
    H,
    K,
    num_experts,
    w_stride_n,
    w_scale_stride_n,
    weights_stride,
    ids_stride,
    TOP_K: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[t] as `weighted_sum`, where the last choice's value is a[its pair] . w, in float32.

    w [H, K]: the last expert's. A token whose last choice is another expert, or none, leaves that value out.
    """
    rows = tl.program_id(1).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < tokens
    pairs = rows * TOP_K + TOP_K - 1
    last = tl.load(ids_ptr + rows * ids_stride + TOP_K - 1, mask=inside, other=-1) == num_experts - 1
    ks = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + pairs[:, None] * K + ks[None, :]
    w_ptrs = w_ptr + cols.to(tl.int64)[None, :] * w_stride_n + ks[:, None]
    w_scale_ptr += tl.program_id(0) * BLOCK_N // GROUP * w_scale_stride_n
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for group in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        a = tl.load(a_ptrs + group * BLOCK_K, mask=last[:, None], other=0.0)
        w = tl.load(w_ptrs + group * BLOCK_K)
        factor = tl.load(a_scale_ptr + pairs * (K // BLOCK_K) + group, mask=last, other=0.0)
        factor *= tl.load(w_scale_ptr + group * BLOCK_K // GROUP)
        if UPCAST:
            acc += tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee") * factor[:, None]
        else:
            acc += tl.dot(a, w) * factor[:, None]
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for choice in range(TOP_K - 1):
        expert = tl.load(ids_ptr + rows * ids_stride + choice, mask=inside, other=-1)
        weight = tl.load(weights_ptr + rows * weights_stride + choice, mask=inside, other=0.0).to(tl.float32)
        held = (expert >= 0) & (expert < num_experts)  # rows of skipped pairs were never written
        places = values_ptr + (rows * TOP_K + choice)[:, None] * H + cols[None, :]
        value = tl.load(places, mask=held[:, None], other=0.0).to(tl.float32)
        total += tl.where(held, weight, 0.0)[:, None] * value
    weight = tl.load(weights_ptr + rows * weights_stride + TOP_K - 1, mask=last, other=0.0).to(tl.float32)
    total += acc * weight[:, None]
    places = out_ptr + rows[:, None] * H + cols[None, :]
    tl.store(places, total.to(out_ptr.dtype.element_ty), mask=inside[:, None])


def shared_sum(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    values: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    block_m: int = 64,
    block_n: int = 128,
    num_warps: int = 4,
    num_stages: int = 3,
) -> None:
    """Fill out [T, H] from the routed pairs' values [T * k, H] and the shared expert's inner codes a [T * k, I].

    The shared expert is weight's [E, H, I] last, and every token's last choice; scale [E, H / 128, I / 128], a_scale
    [T * k, groups of I]. Rows of other choices of the shared expert than the last are taken from values.
    """
    (tokens, hidden), top_k, num_experts = out.shape, topk_ids.shape[1], weight.shape[0]
    codes = weight_codes(weight)[-1]
    _shared_sum_kernel[(cdiv(hidden, block_n), cdiv(tokens, block_m))](
        a,
        a_scale,
        codes,
        scale[-1],
        values,
        topk_weights,
        topk_ids,
        out,
        tokens,
        hidden,
        a.shape[1],
        num_experts,
        codes.stride(0),
        scale.stride(1),
        topk_weights.stride(0),
        topk_ids.stride(0),
        TOP_K=top_k,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        BLOCK_K=a.shape[1] // a_scale.shape[1],
        GROUP=GROUP,
        STAGES=num_stages,
        UPCAST=interpreting() and not a.is_cuda,
        num_warps=num_warps,
        num_stages=num_stages,
    )
