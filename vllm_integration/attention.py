"""Gated full attention inside vLLM: vLLM's projections and paged attention, our QK-norm, rotary and gate."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GatedAttentionParts
from qwen3next_plugin.layers_base import ParallelLayers


class Qwen3NextGatedAttention(GatedAttentionParts):
    """Gated attention over vLLM's paged cache."""

    def __init__(
        self,
        spec: Qwen3NextSpec,
        vllm_config: VllmConfig,
        layers: ParallelLayers,
        cos_sin: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__(spec, layers, cos_sin, prefix)
        self.attn = Attention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        q, k, v, gate = self.project(positions, hidden_states)
        return self.finish(self.attn(q, k, v), gate)
