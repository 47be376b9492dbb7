"""Gated full attention inside SGLang: its projections and paged attention, our QK-norm, rotary and gate."""

from __future__ import annotations

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GatedAttentionParts
from qwen3next_plugin.layers_base import ParallelLayers


class Qwen3NextGatedAttention(GatedAttentionParts):
    """Gated attention over SGLang's token pool; `layer_id` is the layer's number there."""

    def __init__(
        self, spec: Qwen3NextSpec, layers: ParallelLayers, layer_id: int, cos_sin: torch.Tensor, prefix: str
    ) -> None:
        super().__init__(spec, layers, cos_sin, prefix)
        self.attn = RadixAttention(
            self.num_heads,
            self.head_dim,
            self.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_id,
            quant_config=layers.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        q, k, v, gate = self.project(positions, hidden_states)
        return self.finish(self.attn(q, k, v, forward_batch), gate)
