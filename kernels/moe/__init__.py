"""Routing, the mixture of experts and the shared expert's gate, as custom ops."""

import torch

from .. import dispatch
from . import reference
from .check import check_fused_moe, check_route, check_shared
from .ways import way_choices

dispatch.declare("route")
dispatch.declare("fused_moe", cuda=way_choices)
dispatch.declare("add_shared_expert")


def _route_fake(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    x: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    shape = (router_logits.shape[0], top_k + (shared_gate is not None))
    return router_logits.new_empty(shape, dtype=torch.float32), router_logits.new_empty(shape, dtype=torch.int32)


@dispatch.custom_op(fake=_route_fake)
def route(
    router_logits: torch.Tensor,
    top_k: int,
    renormalize: bool,
    x: torch.Tensor | None = None,
    shared_gate: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over all experts, then the top_k largest, then (if asked) renormalised to sum 1; float32 inside.

    router_logits [M, E] bf16/fp16/fp32, E <= 1024, rows may be strided -> (weights [M, top_k] float32, ids [M, top_k]
    int32), largest first. With x [M, H] and shared_gate [1, H] each token has one more choice, its last: expert E, the
    shared one, by sigmoid(x . shared_gate). Ties: the lower expert index comes first; a NaN logit ranks as -inf and
    makes the row's weights NaN. Raises ValueError for shapes that do not fit. Shazeer et al. 2017, section 2.1; Fedus
    et al. 2021, section 2.1.
    """
    check_route(router_logits, top_k, x, shared_gate)
    if dispatch.choose(router_logits, backend) == dispatch.REFERENCE:
        weights, ids = reference.route(router_logits, top_k, renormalize, x, shared_gate)
        return weights.to(torch.float32), ids
    from . import triton

    return triton.route(router_logits, top_k, renormalize, x, shared_gate)


def _fused_moe_fake(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    *,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
    quantize_activations: bool | None = None,
    num_shared: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    return x.new_empty(x.shape)


@dispatch.custom_op(fake=_fused_moe_fake)
def fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    w2_scale: torch.Tensor | None = None,
    *,
    w13_zero: torch.Tensor | None = None,
    w2_zero: torch.Tensor | None = None,
    quantize_activations: bool | None = None,
    num_shared: int = 0,
    backend: str | None = None,
) -> torch.Tensor:
    """y[m] = sum over k of topk_weights[m,k] * w2[e] @ swiglu(w13[e] @ x[m]) with e = topk_ids[m,k].

    x [M, H] bf16/fp16/fp32; w13 [E, 2I, H] (gate rows, then up rows) and w2 [E, H, I] of x's dtype, or quantised:

    - float8_e4m3fn with float32 block factors w13_scale [E, 2*ceil(I/b), ceil(H/b)] (gate and up blocked each for
      itself) and w2_scale [E, ceil(H/b), ceil(I/b)], where b is 128 or, told by the scale's shape, a smaller power of
      two; or with one factor a row, [E, 2I, 1] and [E, H, 1]
    - int8 (INT8) with w13_scale [E, 2I, H/G] and w2_scale [E, H, I/G] of any float type, G dividing H (I), at least 16
    - uint8 (INT4), two codes a byte: w13 [E, 2I, H/2], w2 [E, H, I/2], scales as for INT8, and zeros w13_zero and
      w2_zero uint8 like the scales, None: 8 everywhere; see `gemm.integer`

    topk_weights [M, k] float32, topk_ids [M, k] int32. Ids outside [0, E) are skipped (-1 under expert parallelism).
    quantize_activations rounds the inputs of both products: to FP8 by 1x128 groups (FP8 weights), or to INT8 by tokens
    (INT8 weights with one scale a row), summed in int32. None: with FP8 blocks on a GPU with FP8 units from
    `ways.MAX_TOKENS` + 1 tokens on (`ways.rounds`), else they are kept. What was activated is rounded to x's dtype.
    With many tokens an engine's grouped product may stand in for ours (`peers`): what lies between the products is
    rounded to bfloat16 then. num_shared says how many of the experts, the last ones, take every token as its last
    choices: tiles are chosen by what is left. Each token's experts are summed in a fixed order: equal inputs give equal
    bits. Returns [M, H] in x's dtype. Raises ValueError for shapes or dtypes that do not fit.
    Shazeer et al. 2017; Shazeer, GLU Variants Improve Transformer, 2020.
    """
    check_fused_moe(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, quantize_activations, w13_zero, w2_zero)
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        rounds = bool(quantize_activations)
        return reference.fused_moe(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, rounds, w13_zero, w2_zero)
    from . import triton

    return triton.fused_moe(
        x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, quantize_activations, w13_zero, w2_zero, num_shared
    )


def _add_shared_expert_fake(
    routed: torch.Tensor,
    shared: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    return routed.new_empty(routed.shape)


@dispatch.custom_op(fake=_add_shared_expert_fake)
def add_shared_expert(
    routed: torch.Tensor,
    shared: torch.Tensor,
    x: torch.Tensor,
    gate_weight: torch.Tensor,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """routed + sigmoid(x @ gate_weight.T) * shared, float32 inside.

    routed, shared and x [M, H] of one dtype, rows may be strided; gate_weight [1, H]. Returns a contiguous [M, H].
    Raises ValueError for shapes or dtypes that do not fit.
    """
    check_shared(routed, shared, x, gate_weight)
    if dispatch.choose(routed, backend) == dispatch.REFERENCE:
        return reference.add_shared_expert(routed, shared, x, gate_weight).contiguous()
    from . import triton

    return triton.add_shared_expert(routed, shared, x, gate_weight)
