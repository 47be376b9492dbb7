"""The Gated DeltaNet layer inside SGLang: its parallel layers for the projections, its backend between them."""

from __future__ import annotations

import torch
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GdnParts
from qwen3next_plugin.layers_base import ParallelLayers, ZeroCentredRMSNorm


class Qwen3NextGdnLayer(GdnParts):
    """Gated DeltaNet over SGLang's state pool; `layer_id` is the layer's number there."""

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, layer_id: int, prefix: str) -> None:
        super().__init__(spec, layers, prefix)
        # What SGLang's backends take a layer's sizes from, and ours its parameters.
        self.attn = RadixLinearAttention(
            layer_id=layer_id,
            num_q_heads=self.num_k_heads,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_q_dim=spec.gdn.head_k_dim,
            head_k_dim=spec.gdn.head_k_dim,
            head_v_dim=spec.gdn.head_v_dim,
        )
        self.attn.core_parameters = self.core_parameters

    def forward(
        self,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm: ZeroCentredRMSNorm,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, hidden_size] -> the output for the sum's norm, summed over the ranks; the sum."""
        qkvz, ba, residual = self.project(hidden_states, residual, norm)
        a, b = self.gates(ba)
        # SGLang looks at the number of rows of mixed_qkv only, and cuts off padding there: so z goes with it.
        core = self.attn(forward_batch, mixed_qkv=qkvz, a=a, b=b)
        return self.finish(core.view(-1, self.num_v_heads, self.head_v_dim)), residual
