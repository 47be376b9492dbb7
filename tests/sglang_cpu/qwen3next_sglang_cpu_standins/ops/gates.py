"""Gated norm and gates of SGLang's own Qwen3-Next, which are Triton kernels there."""

from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.kernels.norm.reference import rms_norm_gated
from qwen3next_plugin.kernels.rope.reference import sigmoid_gate


def fused_rms_norm_gated(
    self: Any,
    x: Tensor,
    g: Tensor,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
) -> Tensor:
    """``FusedRMSNormGated.forward`` with SiLU: x and g ``[..., V]``, the module's weight ``[V]`` and eps."""
    if residual is not None or prenorm or self.activation not in ("silu", "swish"):
        raise NotImplementedError("FusedRMSNormGated: only what Qwen3-Next needs has a stand-in")
    return rms_norm_gated(x, g, self.weight, self.eps)


def fused_sigmoid_mul(attn_output: Tensor, gate: Tensor, inplace: bool = False) -> Tensor:
    """``attn_output * sigmoid(gate)``; gate ``[T, heads, D]`` may belong to an output ``[T, heads * D]``."""
    gated = sigmoid_gate(attn_output, gate.reshape(attn_output.shape))
    return attn_output.copy_(gated) if inplace else gated


def fused_gate_sigmoid_mul_add(
    hidden_states: Tensor, gate_weight: Tensor, shared_output: Tensor, final_hidden_states: Tensor
) -> None:
    """Add the shared expert: ``final += sigmoid(hidden @ weight) * shared`` with weight ``[H]``; in place."""
    gate = torch.sigmoid(hidden_states.float() @ gate_weight.float().view(-1)).unsqueeze(-1)
    final_hidden_states.copy_(final_hidden_states.float() + gate * shared_output.float())
