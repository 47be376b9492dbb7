"""Routing and the mixture of experts as formulas: differentiable torch, quick enough on a CPU for small models."""

import torch
from torch.nn import functional

from ..gemm.formats import dequantize, round_activations


def route(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    x: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, the top_k largest, optionally renormalised to sum 1.

    router_logits [M, E] -> (weights [M, top_k], ids [M, top_k] int32), largest first; float32 inside and out (float64
    stays float64). With x [M, H] and shared_gate [1, H] one choice more: expert E by sigmoid(x . shared_gate). Experts
    are ranked by logit, which softmax keeps; among equal logits the lower expert index comes first, NaN counts as -inf.
    Fedus et al., Switch Transformers, 2021, section 2.1, with k experts.
    """
    logits = router_logits.to(torch.promote_types(router_logits.dtype, torch.float32))
    rank = logits.detach().masked_fill(logits.isnan(), float("-inf"))
    ids = rank.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights = torch.softmax(logits, dim=-1).gather(-1, ids)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    if x is not None and shared_gate is not None:
        gate = torch.sigmoid(functional.linear(x.to(logits.dtype), shared_gate.to(logits.dtype)))
        weights, ids = torch.cat([weights, gate], 1), functional.pad(ids, (0, 1), value=logits.shape[1])
    return weights, ids.to(torch.int32)


def swiglu(gate_up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up for gate_up [..., 2I] = gate | up; float32 inside, gate_up's dtype out.

    Shazeer, GLU Variants Improve Transformer, 2020.
    """
    gate, up = gate_up.to(torch.promote_types(gate_up.dtype, torch.float32)).chunk(2, dim=-1)
    return (functional.silu(gate) * up).to(gate_up.dtype)


def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    quantize_activations: bool = False,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
) -> torch.Tensor:
    """y[m] = sum over k of topk_weights[m,k] * w2[e] @ swiglu(w13[e] @ x[m]), e = topk_ids[m,k]; e < 0 adds nothing.

    x [M, H], w13 [E, 2I, H] (gate rows, then up rows), w2 [E, H, I], ids and weights [M, k] -> [M, H] in x's dtype.
    Quantised weights come with factors (and INT4 with zeros) and are dequantised; their products run in float32. With
    quantize_activations the inputs of both products are rounded: to FP8 by groups of 1x128, to INT8 by tokens.
    """
    tokens, top_k = topk_ids.shape
    compute = x.dtype if w13_scale is None else torch.promote_types(x.dtype, torch.float32)
    flat = topk_ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = torch.bincount(flat.clamp(min=-1) + 1, minlength=w13.shape[0] + 1).tolist()
    skipped, active = counts[0], [(expert, count) for expert, count in enumerate(counts[1:]) if count]
    sizes = [count for _, count in active]

    def project(
        rows: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None, zero: torch.Tensor | None, halves: int
    ) -> torch.Tensor:
        """Each expert's rows [rows, K] by its matrix of weight [E, N, K], whose blocks start anew in each half."""
        rows = round_activations(rows, weight, compute) if quantize_activations else rows.to(compute)
        # in training unbound once: the gradient of weight[expert] would be a tensor of all experts' size for each
        matrices, parts = weight.unbind(0) if weight.requires_grad else weight, []
        for (expert, _), part in zip(active, rows.split(sizes), strict=True):
            matrix = matrices[expert]
            if scale is not None:
                codes, factors = matrix.unflatten(0, (halves, -1)), scale[expert].unflatten(0, (halves, -1))
                zeros = None if zero is None else zero[expert].unflatten(0, (halves, -1))
                matrix = dequantize(codes, factors, zeros, compute).flatten(0, 1)
            parts.append(functional.linear(part, matrix))
        return torch.cat(parts)

    if not active:
        return x.new_zeros(x.shape)
    activated = swiglu(project(x[order[skipped:] // top_k], w13, w13_scale, w13_zero, 2))
    sorted_pairs = project(activated, w2, w2_scale, w2_zero, 1)
    pairs = sorted_pairs.new_zeros(flat.numel(), x.shape[1]).index_copy(0, order[skipped:], sorted_pairs)
    accumulate = torch.promote_types(x.dtype, torch.float32)
    pairs = pairs.view(tokens, top_k, x.shape[1]).to(accumulate)
    return torch.einsum("mkh,mk->mh", pairs, topk_weights.to(accumulate)).to(x.dtype)


def add_shared_expert(
    routed: torch.Tensor, shared: torch.Tensor, x: torch.Tensor, gate_weight: torch.Tensor
) -> torch.Tensor:
    """routed + sigmoid(x @ gate_weight.T) * shared; all [M, H], gate_weight [1, H]; float32 inside."""
    dtype = torch.promote_types(routed.dtype, torch.float32)
    gate = torch.sigmoid(functional.linear(x.to(dtype), gate_weight.to(dtype)))
    return (routed.to(dtype) + gate * shared.to(dtype)).to(routed.dtype)
