"""The choice of experts of SGLang's own model."""

from torch import Tensor

from qwen3next_plugin.kernels.moe.reference import route


def topk_softmax_cpu(
    hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool, correction_bias: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``kernels.moe``'s routing of ``gating_output [M, E]``: weights ``[M, topk]`` float32 and experts int32."""
    if correction_bias is not None:
        raise NotImplementedError("topk_softmax_cpu: Qwen3-Next has no correction bias, and this stand-in neither")
    weights, experts = route(gating_output, topk, renormalize)
    return weights, experts
