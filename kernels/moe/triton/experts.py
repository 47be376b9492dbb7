"""The mixture of experts in Triton: sort pairs by expert, gate-up product with SwiGLU, down product, weighted sum.

Few tokens take a shorter way (`few`), some more need no sorting (`apart`), some hundred pairs are sorted in the launch
that rounds their tokens (`ordered`), and many tokens meet other products (`tall`, `by_peer`).

All intermediate results are indexed by pair (token, choice), so every value is written once, by one program, and summed
in the order of the choices: no atomics, and equal inputs give equal bits. Nothing is read back to the host and every
grid follows from shapes alone, so a CUDA graph can hold it.
"""

import torch

from ...gemm.reference import FP8, GROUP
from ..ways import choose_way
from .align import align
from .apart import tiles_apart
from .by_peer import fused_moe_by_peer
from .combine import weighted_sum
from .few import fused_moe_few
from .grouped import grouped_product
from .ordered import tiles_in_order
from .tall import fused_moe_tall
from .walking import walking_product, walks


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
    if way.tall:
        return fused_moe_tall(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)
    if way.plan is not None:
        return fused_moe_by_peer(way.plan, x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale)
    if config is None:
        return fused_moe_few(x, w13, w2, topk_weights, topk_ids, w13_scale, w2_scale, way.early)
    out, values = x.new_empty(x.shape), x.new_empty((tokens * top_k, hidden))
    # Where a tile of gate and up is as wide as a group of the next product's inputs, it rounds them itself.
    fp8 = way.quantize and w13.dtype is FP8
    walking = walks(w2, w2_scale, way.quantize, config.block_m)  # which rounds them, too
    rounds = fp8 and not walking and config.gate_up.block_n == GROUP and inner % GROUP == 0
    activated = x.new_empty((tokens * top_k, inner), dtype=FP8 if rounds else x.dtype)
    scale = x.new_empty((tokens * top_k, inner // GROUP), dtype=torch.float32) if rounds else None
    x_scale = None
    if way.chunks:
        tiles, _ = align(topk_ids, num_experts, config.block_m, way.early)
    else:
        prepare = tiles_apart if way.apart else tiles_in_order
        tiles, x, x_scale = prepare(topk_ids, num_experts, config.block_m, x, fp8, way.early)
    grouped_product(
        x, w13, w13_scale, w13_zero, tiles, config.gate_up, activated,
        pairs_per_row=top_k, swiglu=True, quantize=way.quantize, a_scale=x_scale, out_scale=scale, early=way.early,
    )  # fmt: skip
    if walking and w2_scale is not None:
        walking_product(activated, w2, w2_scale, tiles, values, way.early)
    else:
        grouped_product(
            activated, w2, w2_scale, w2_zero, tiles, config.down, values,
            pairs_per_row=1, swiglu=False, quantize=way.quantize, a_scale=scale, early=way.early,
        )  # fmt: skip
    weighted_sum(values, None, topk_weights, topk_ids, num_experts, out, few=not way.chunks, early=way.early)
    return out
