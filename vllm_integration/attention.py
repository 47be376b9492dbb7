"""Gated full attention inside vLLM: vLLM's projections and paged attention, our QK-norm, rotary and gate."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import QKVParallelLinear, RowParallelLinear

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.rope import qk_norm_rope, sigmoid_gate

from .norm import WeightHolder


class Qwen3NextGatedAttention(nn.Module):
    """Attention whose query projection carries an output gate; all layers share `cos_sin` [P, rotary_dim] fp32."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, cos_sin: torch.Tensor, prefix: str) -> None:
        super().__init__()
        attention = spec.attention
        tp_size = get_tensor_model_parallel_world_size()
        self.eps = spec.rms_norm_eps
        self.head_dim = attention.head_dim
        self.num_heads = attention.num_heads // tp_size
        self.num_kv_heads = max(1, attention.num_kv_heads // tp_size)
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
        self.q_norm = WeightHolder(attention.head_dim)
        self.k_norm = WeightHolder(attention.head_dim)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin, persistent=False)
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
        q, k, v, gate = qk_norm_rope(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            self.cos_sin,
            positions,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=self.eps,
        )
        output, _ = self.o_proj(sigmoid_gate(self.attn(q, k, v), gate))
        return output
