"""Gated full attention inside vLLM: its projections and paged attention, our QK-norm, rotary, cache write and gate.

A cache that holds keys and values as they are takes them from the kernel that normalises and turns them: one launch
where vLLM has two. As the slots are known to vLLM's attention alone, both are one operation for torch.compile. Caches
of another layout are written by vLLM in there; where it quantises queries (FP8 caches), the way is its own.
"""

from __future__ import annotations

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention.attention import get_attention_context, unified_attention_with_output
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.rope import qk_norm_rope, qk_norm_rope_write
from qwen3next_plugin.layers import GatedAttentionParts
from qwen3next_plugin.layers_base import ParallelLayers, ZeroCentredRMSNorm

from .names import ATTENTION_OP

_ALIKE = ("FLASH_ATTN", "FLASHINFER", "TRITON_ATTN", "FLEX_ATTENTION")
"""Backends that lay a cache out in one way, [pages, kv heads, page size, key then value], in any order in memory."""


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
        self.in_one = writes_apart(self.attn)

    def forward(
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm: ZeroCentredRMSNorm,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], both [T, hidden_size] -> the output for the sum's norm, summed over the ranks; the sum."""
        qkv, residual = self.project(hidden_states, residual, norm)
        if not self.in_one:
            q, k, v, gate = self.split(positions, qkv)
            return self.finish(self.attn(q, k, v), gate), residual
        # Of two shapes: torch.compile may take two equal allocations for one.
        attended = qkv.new_empty(qkv.shape[0], self.num_heads, self.head_dim)
        gate = qkv.new_empty(qkv.shape[0], self.num_heads * self.head_dim)
        torch.ops.vllm.qwen3next_plugin_attention(
            qkv, *self.constants(), positions, attended, gate, self.eps, _encode_layer_name(self.attn.layer_name)
        )
        return self.finish(attended.flatten(1), gate), residual


def writes_apart(attn: Attention) -> bool:
    """Whether the layer writes its own cache before it attends, and does nothing else before."""
    includes = attn.attn_backend.forward_includes_kv_cache_update
    return not includes and attn.kv_sharing_target_layer_name is None and attn.query_quant is None


def takes_our_writes(attn: Attention) -> bool:
    """Whether the layer's cache is laid out as we write one, and holds keys and values as they are."""
    return attn.attn_backend.get_name() in _ALIKE and attn.kv_cache_torch_dtype == attn.dtype


def keys_and_values(kv_cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Views [pages, page size, kv heads, head_dim] of vLLM's cache [pages, kv heads, page size, 2 * head_dim]."""
    keys, values = kv_cache.transpose(1, 2).split(head_dim, dim=-1)
    return keys, values


@eager_break_during_capture
def qwen3next_plugin_attention(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    attended: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    layer_name: LayerNameType,
) -> None:
    """The custom op between the projections, opaque to torch.compile.

    Fills attended [T, heads, D], gate [T, heads * D] and the cache.
    """
    _, attn, kv_cache, slots = get_attention_context(_resolve_layer_name(layer_name))
    heads, kv_heads, head_dim = attn.num_heads, attn.num_kv_heads, attn.head_size
    sizes = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim}
    call = (qkv, q_weight, k_weight, cos_sin, positions)
    ours = slots is not None and takes_our_writes(attn)
    if ours:
        q, k, v = qk_norm_rope_write(*call, gate, *keys_and_values(kv_cache, head_dim), slots, **sizes, eps=eps)
    else:
        q, k, v, gates = qk_norm_rope(*call, **sizes, eps=eps)
        gate.copy_(gates)
    q, k, v = (part.view(-1, count, head_dim) for part, count in ((q, heads), (k, kv_heads), (v, kv_heads)))
    if slots is not None and not ours:  # without slots, in memory profiling, there is no cache
        attn.impl.do_kv_cache_update(attn, k, v, kv_cache, slots)
    unified_attention_with_output(q, k, v, attended, layer_name)


def _attention_fake(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    attended: torch.Tensor,
    gate: torch.Tensor,
    eps: float,
    layer_name: LayerNameType,
) -> None:
    return None


direct_register_custom_op(
    op_name=ATTENTION_OP.split("::")[1],
    op_func=qwen3next_plugin_attention,
    mutates_args=["attended", "gate"],
    fake_impl=_attention_fake,
)
