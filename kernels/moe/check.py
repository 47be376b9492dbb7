"""Argument checks of the MoE operations: what was given and what would fit, in one sentence."""

import torch

from ..gemm.formats import QUANTIZED, check_quantized, check_rounding, columns_of
from ..gemm.reference import FP8, has_row_factors

MAX_EXPERTS = 1024  # the router keeps a token's whole row in registers


def check_route(
    router_logits: torch.Tensor, top_k: int, x: torch.Tensor | None = None, shared_gate: torch.Tensor | None = None
) -> None:
    """Raise ValueError unless router_logits is [M, E], E <= 1024, 1 <= top_k <= E, and x [M, H], shared_gate [1, H]."""
    if router_logits.dim() != 2 or not 1 <= router_logits.shape[1] <= MAX_EXPERTS:
        raise ValueError(f"route: router_logits is {list(router_logits.shape)}; it must be [M, E], E <= {MAX_EXPERTS}")
    if not 1 <= top_k <= router_logits.shape[1]:
        raise ValueError(f"route: top_k is {top_k}; it must be between 1 and the {router_logits.shape[1]} experts")
    if (x is None) != (shared_gate is None):
        raise ValueError("route: give both x and shared_gate (a shared expert among the choices) or neither")
    if x is not None and shared_gate is not None:
        tokens = router_logits.shape[0]
        if x.dim() != 2 or x.shape[0] != tokens or list(shared_gate.shape) != [1, x.shape[1]]:
            raise ValueError(
                f"route: x and shared_gate are {list(x.shape)} and {list(shared_gate.shape)}; they must be "
                f"[{tokens}, H] and [1, H]"
            )


def check_fused_moe(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    quantize_activations: bool | None,
    w13_zero: torch.Tensor | None,
    w2_zero: torch.Tensor | None,
) -> None:
    """Raise ValueError unless the shapes, dtypes and scales fit each other (see `fused_moe`)."""
    if x.dim() != 2 or w13.dim() != 3 or w2.dim() != 3:
        raise ValueError(
            f"fused_moe: x, w13 and w2 are {list(x.shape)}, {list(w13.shape)} and {list(w2.shape)}; they must be "
            "[M, H], [E, 2I, H] and [E, H, I]"
        )
    experts, hidden, inner = w13.shape[0], x.shape[1], columns_of(w2)
    held13, held2 = [experts, 2 * inner, columns_of(w13)], [w2.shape[0], w2.shape[1], inner]
    if held13 != [experts, 2 * inner, hidden] or list(w13.shape[:2]) != held13[:2] or held2 != [experts, hidden, inner]:
        packed = " with two codes a byte" if torch.uint8 in (w13.dtype, w2.dtype) else ""
        raise ValueError(
            f"fused_moe: w13 is {list(w13.shape)} and w2 is {list(w2.shape)}{packed}; with x {list(x.shape)} and "
            f"I = {inner} they must be [E, {2 * inner}, {hidden}] and [E, {hidden}, {inner}]"
        )
    if topk_ids.dim() != 2 or topk_ids.shape != topk_weights.shape or topk_ids.shape[0] != x.shape[0]:
        raise ValueError(
            f"fused_moe: topk_weights is {list(topk_weights.shape)} and topk_ids is {list(topk_ids.shape)}; both must "
            f"be [{x.shape[0]}, k]"
        )
    if topk_ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"fused_moe: topk_ids is {topk_ids.dtype}; it must be int32 or int64")
    if (w13_scale is None) != (w2_scale is None):
        raise ValueError("fused_moe: give both w13_scale and w2_scale (quantised weights) or neither")
    if w13_scale is None or w2_scale is None:
        if quantize_activations:
            raise ValueError(
                "fused_moe: quantize_activations needs FP8 weights or INT8 ones with w13_scale and w2_scale"
            )
        if w13_zero is not None or w2_zero is not None:
            raise ValueError("fused_moe: w13_zero and w2_zero belong to INT4 weights with w13_scale and w2_scale")
    elif w13.dtype != w2.dtype or w13.dtype not in QUANTIZED:
        raise ValueError(
            f"fused_moe: w13 is {w13.dtype} and w2 is {w2.dtype}; with scales both must be one of "
            f"{', '.join(map(str, QUANTIZED))}"
        )
    else:
        _check_quantized_experts(w13, w13_scale, w13_zero, "w13")
        check_quantized(w2, w2_scale, w2_zero, _names("w2"))
        if w13.dtype is FP8 and has_row_factors(w13, w13_scale) != has_row_factors(w2, w2_scale):
            raise ValueError(
                f"fused_moe: w13_scale is {list(w13_scale.shape)} and w2_scale is {list(w2_scale.shape)}; both must "
                "hold a factor a block, or both a factor a row"
            )
        for name, weight, scale in (("w13", w13, w13_scale), ("w2", w2, w2_scale)):
            check_rounding(bool(quantize_activations), weight, scale, _names(name)[:2])
        return
    if w13.dtype != x.dtype or w2.dtype != x.dtype:
        raise ValueError(f"fused_moe: w13 is {w13.dtype} and w2 is {w2.dtype}; without scales both must be {x.dtype}")


def _names(name: str) -> tuple[str, str, str]:
    return name, f"{name}_scale", f"{name}_zero"


def _check_quantized_experts(w13: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, name: str) -> None:
    """Gate and up are quantised each for itself: FP8 blocks start anew in each half."""
    if w13.dtype is not FP8:
        return check_quantized(w13, scale, zero, _names(name))
    if scale.dim() != 3 or scale.shape[0] != w13.shape[0]:
        raise ValueError(
            f"fused_moe: {name}_scale is {list(scale.shape)}; it must be [{w13.shape[0]}, row blocks, column blocks]"
        )
    if scale.shape[1] % 2:
        raise ValueError(f"fused_moe: {name}_scale is {list(scale.shape)}; gate and up need as many row blocks each")
    check_quantized(w13.unflatten(1, (2, -1)), scale.unflatten(1, (2, -1)), zero, _names(name))


def check_shared(routed: torch.Tensor, shared: torch.Tensor, x: torch.Tensor, gate_weight: torch.Tensor) -> None:
    """Raise ValueError unless routed, shared and x are one [M, H] of one dtype and gate_weight is [1, H]."""
    if routed.dim() != 2 or shared.shape != routed.shape or x.shape != routed.shape:
        raise ValueError(
            f"add_shared_expert: routed, shared and x are {list(routed.shape)}, {list(shared.shape)} and "
            f"{list(x.shape)}; all must be one [M, H]"
        )
    if shared.dtype != routed.dtype or x.dtype != routed.dtype:
        raise ValueError(f"add_shared_expert: dtypes differ: {routed.dtype}, {shared.dtype} and {x.dtype}")
    if list(gate_weight.shape) != [1, routed.shape[1]]:
        raise ValueError(
            f"add_shared_expert: gate_weight is {list(gate_weight.shape)}; it must be [1, {routed.shape[1]}]"
        )
