"""The Gated DeltaNet layer inside SGLang: its parallel layers for the projections, its backend between them."""

from __future__ import annotations

import torch
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GdnParts
from qwen3next_plugin.layers_base import ParallelLayers


class Qwen3NextGdnLayer(GdnParts):
    """Gated DeltaNet over SGLang's state pool; `layer_id` is the layer's number there."""

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, layer_id: int, prefix: str) -> None:
        super().__init__(spec, layers, prefix)
        # What SGLang's backends take a layer's sizes and recurrent weights from; the parameters are this layer's own.
        self.attn = RadixLinearAttention(
            layer_id=layer_id,
            num_q_heads=self.num_k_heads,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_q_dim=spec.gdn.head_k_dim,
            head_k_dim=spec.gdn.head_k_dim,
            head_v_dim=spec.gdn.head_v_dim,
            conv_weights=self.conv1d.weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        qkvz, ba = self.project(hidden_states)
        mixed_qkv, a, b = self.core_inputs(qkvz, ba)
        core = self.attn(forward_batch, mixed_qkv=mixed_qkv, a=a, b=b)
        return self.finish(core.view(-1, self.num_v_heads, self.head_v_dim), qkvz)
