"""Gated full attention inside vLLM: vLLM's projections and paged attention, our QK-norm, rotary and gate."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.rope import sigmoid_gate
from qwen3next_plugin.layers import GatedAttentionParts


class Qwen3NextGatedAttention(GatedAttentionParts):
    """Attention whose query projection carries an output gate; all layers share `cos_sin` [P, rotary_dim] fp32."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, cos_sin: torch.Tensor, prefix: str) -> None:
        super().__init__(spec, get_tensor_model_parallel_world_size(), cos_sin)
        attention = spec.attention
        self.qkv_proj = QKVParallelLinear(
            spec.hidden_size,
            attention.head_dim,
            2 * attention.num_heads,  # per head: query, then gate
            attention.num_kv_heads,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            attention.num_heads * attention.head_dim,
            spec.hidden_size,
            bias=False,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.o_proj",
        )
        self.attn = Attention(
            self.num_heads,
            attention.head_dim,
            attention.head_dim**-0.5,
            num_kv_heads=self.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=vllm_config.quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        """positions [T], hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        qkv, _ = self.qkv_proj(hidden_states)
        q, k, v, gate = self.norm_and_rotate(qkv, positions)
        output, _ = self.o_proj(sigmoid_gate(self.attn(q, k, v), gate))
        return output
