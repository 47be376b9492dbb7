"""Gated full attention inside SGLang: its projections and paged attention, our QK-norm, rotary and gate."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import QKVParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.rope import sigmoid_gate
from qwen3next_plugin.layers import GatedAttentionParts

from .names import tensor_parallel


class Qwen3NextGatedAttention(GatedAttentionParts):
    """Attention whose query projection carries an output gate; all layers share `cos_sin` [P, rotary_dim] fp32."""

    def __init__(
        self,
        spec: Qwen3NextSpec,
        layer_id: int,
        quant_config: QuantizationConfig | None,
        cos_sin: torch.Tensor,
        prefix: str,
    ) -> None:
        super().__init__(spec, tensor_parallel()[1], cos_sin)
        attention = spec.attention
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size,
            attention.head_dim,
            2 * attention.num_heads,  # per head: query, then gate
            attention.num_kv_heads,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            attention.num_heads * attention.head_dim,
            spec.hidden_size,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = RadixAttention(
            self.num_heads,
            attention.head_dim,
            attention.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            layer_id=layer_id,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, forward_batch: ForwardBatch
    ) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v, gate = self.norm_and_rotate(qkv, positions)
        output, _ = self.o_proj(sigmoid_gate(self.attn(q, k, v, forward_batch), gate))
        return output
