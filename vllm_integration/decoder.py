"""One decoder layer: a token mixer (Gated DeltaNet or gated attention), then experts or a plain MLP."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec

from .attention import Qwen3NextGatedAttention
from .gdn_layer import Qwen3NextGdnLayer
from .moe import Qwen3NextMLP, Qwen3NextMoE
from .norm import ZeroCentredRMSNorm


class Qwen3NextDecoderLayer(nn.Module):
    """Pre-norm residual layer; sub-modules carry the checkpoint's names."""

    def __init__(
        self,
        spec: Qwen3NextSpec,
        vllm_config: VllmConfig,
        *,
        kind: LayerKind,
        dense: bool,
        cos_sin: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__()
        self.kind = kind
        if kind is LayerKind.LINEAR:
            self.linear_attn = Qwen3NextGdnLayer(spec, vllm_config, prefix=f"{prefix}.linear_attn")
        else:
            self.self_attn = Qwen3NextGatedAttention(spec, vllm_config, cos_sin, prefix=f"{prefix}.self_attn")
        mlp = f"{prefix}.mlp"
        self.mlp: nn.Module = (
            Qwen3NextMLP(spec, spec.intermediate_size, vllm_config, prefix=mlp, reduce_results=True)
            if dense
            else Qwen3NextMoE(spec, vllm_config, prefix=mlp)
        )
        self.input_layernorm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states and residual [T, hidden_size] -> the MLP's output and the residual it is to be added to."""
        hidden_states, residual = self.input_layernorm.add(hidden_states, residual)
        if self.kind is LayerKind.LINEAR:
            hidden_states = self.linear_attn(hidden_states)
        else:
            hidden_states = self.self_attn(positions, hidden_states)
        hidden_states, residual = self.post_attention_layernorm.add(hidden_states, residual)
        return self.mlp(hidden_states), residual
