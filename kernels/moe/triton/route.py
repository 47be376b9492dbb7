"""Routing and the shared expert's gate in Triton: one program a token, the whole row in registers."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...early import begins_early, launch_options
from ...integers import next_power_of_2

_TAKEN = tl.constexpr(-(2**63))
_TAKEN_SHORT = tl.constexpr(-(2**31))
_ZERO_BITS = {torch.bfloat16: 16, torch.float16: 13, torch.float32: 0}
"""The last bits of a logit in float32 that are always zero, so that an expert's number may stand there."""


@triton.jit
def _route_kernel(
    logits_ptr,
    x_ptr,
    gate_ptr,
    weights_ptr,
    ids_ptr,
    num_experts,
    hidden,
    stride,
    x_stride,
    TOP_K: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    SHARED: tl.constexpr,
    ZERO_BITS: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    experts = tl.arange(0, BLOCK_E)
    places = tl.arange(0, BLOCK_K)
    inside = experts < num_experts
    logits = tl.load(logits_ptr + token * stride + experts, mask=inside, other=float("-inf")).to(tl.float32)
    largest = tl.max(logits, axis=0)
    total = tl.sum(tl.exp(logits - largest), axis=0)
    # One number an expert that sorts by logit and then by lower index, so that a choice is a single maximum. Integers
    # sort like the floats whose bits they are once negative ones are turned round; -0 becomes 0.
    ranked = tl.where(logits == logits, logits + 0.0, float("-inf"))  # NaN never yields an id outside [0, E)
    bits = ranked.to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    # Where a logit leaves room for the index, 32 bits do, which are compared in half the instructions of 64.
    SHORT: tl.constexpr = BLOCK_E <= 2**ZERO_BITS
    TAKEN: tl.constexpr = _TAKEN_SHORT if SHORT else _TAKEN
    LOGIT: tl.constexpr = -(2**ZERO_BITS)
    if SHORT:
        keys = (ordered & LOGIT) | (BLOCK_E - 1 - experts)
    else:
        keys = (ordered.to(tl.int64) << 32) | (BLOCK_E - 1 - experts)
    keys = tl.where(inside, keys, TAKEN)
    weights = tl.zeros([BLOCK_K], dtype=tl.float32)
    ids = tl.zeros([BLOCK_K], dtype=tl.int32)
    for place in range(TOP_K):
        best = tl.max(keys, axis=0)
        keys = tl.where(keys == best, TAKEN, keys)
        if SHORT:
            high, low = best & LOGIT, best & (BLOCK_E - 1)
        else:
            high, low = (best >> 32).to(tl.int32), (best & 0x7FFFFFFF).to(tl.int32)
        logit = ((high ^ ((high >> 31) & 0x7FFFFFFF)) & LOGIT).to(tl.float32, bitcast=True)
        weights = tl.where(places == place, tl.exp(logit - largest) / total, weights)
        ids = tl.where(places == place, BLOCK_E - 1 - low, ids)
    if RENORMALIZE:
        weights = weights / tl.sum(weights, axis=0)
    if SHARED:
        cols = tl.arange(0, BLOCK_H)
        x = tl.load(x_ptr + token * x_stride + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        gate = tl.load(gate_ptr + cols, mask=cols < hidden, other=0.0).to(tl.float32)
        weights = tl.where(places == TOP_K, tl.sigmoid(tl.sum(x * gate, axis=0)), weights)
        ids = tl.where(places == TOP_K, num_experts, ids)
    CHOICES: tl.constexpr = TOP_K + SHARED
    kept = places < CHOICES
    tl.store(weights_ptr + token * CHOICES + places, weights, mask=kept)
    tl.store(ids_ptr + token * CHOICES + places, ids, mask=kept)


def route(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    x: torch.Tensor | None,
    shared_gate: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.moe.route`; the arguments are taken as checked."""
    logits = router_logits if router_logits.stride(1) == 1 else router_logits.contiguous()
    tokens, num_experts = logits.shape
    shared = x is not None and shared_gate is not None
    if x is None or shared_gate is None:
        x, shared_gate = logits, logits  # not read
    else:
        x, shared_gate = x if x.stride(1) == 1 else x.contiguous(), shared_gate.contiguous()
    weights = logits.new_empty((tokens, top_k + shared), dtype=torch.float32)
    ids = logits.new_empty((tokens, top_k + shared), dtype=torch.int32)
    if tokens:
        block, early = next_power_of_2(num_experts), begins_early(logits.device, tokens)
        _route_kernel[(tokens,)](
            logits,
            x,
            shared_gate,
            weights,
            ids,
            num_experts,
            x.shape[1],
            logits.stride(0),
            x.stride(0),
            TOP_K=top_k,
            RENORMALIZE=renormalize,
            SHARED=int(shared),
            ZERO_BITS=_ZERO_BITS[logits.dtype],
            BLOCK_E=block,
            BLOCK_K=next_power_of_2(top_k + shared),
            BLOCK_H=next_power_of_2(x.shape[1]),
            EARLY=early,
            num_warps=1,  # so that no maximum waits for other warps
            **launch_options(early),
        )
    return weights, ids


@triton.jit
def _add_shared_expert_kernel(
    routed_ptr,
    shared_ptr,
    x_ptr,
    gate_weight_ptr,
    out_ptr,
    hidden,
    routed_stride,
    shared_stride,
    x_stride,
    BLOCK_H: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK_H)
    mask = cols < hidden
    x = tl.load(x_ptr + token * x_stride + cols, mask=mask, other=0.0).to(tl.float32)
    gate_weight = tl.load(gate_weight_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    gate = tl.sigmoid(tl.sum(x * gate_weight, axis=0))
    routed = tl.load(routed_ptr + token * routed_stride + cols, mask=mask, other=0.0).to(tl.float32)
    shared = tl.load(shared_ptr + token * shared_stride + cols, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + token * hidden + cols, (routed + gate * shared).to(out_ptr.dtype.element_ty), mask=mask)


def add_shared_expert(
    routed: torch.Tensor, shared: torch.Tensor, x: torch.Tensor, gate_weight: torch.Tensor
) -> torch.Tensor:
    """See `kernels.moe.add_shared_expert`; the arguments are taken as checked."""
    out = torch.empty(routed.shape, dtype=routed.dtype, device=routed.device)
    if out.numel() == 0:
        return out
    tokens, hidden = routed.shape
    routed, shared, x = (t if t.stride(1) == 1 else t.contiguous() for t in (routed, shared, x))
    block = next_power_of_2(hidden)
    _add_shared_expert_kernel[(tokens,)](
        routed,
        shared,
        x,
        gate_weight.contiguous(),
        out,
        hidden,
        routed.stride(0),
        shared.stride(0),
        x.stride(0),
        BLOCK_H=block,
        num_warps=max(1, min(8, block // 256)),
    )
    return out
