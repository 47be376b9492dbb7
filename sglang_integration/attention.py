"""Gated full attention inside SGLang: its projections and attention, our QK-norm, rotary, cache write and gate."""

from __future__ import annotations

from typing import Any

import torch
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from sglang.srt.model_executor.forward_context import get_attn_backend

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GatedAttentionParts, Places
from qwen3next_plugin.layers_base import ParallelLayers, ZeroCentredRMSNorm

_FIRST = 1  # slot 0 is for tokens that pad a graph's batch, and SGLang's own writing leaves it out


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
        self,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        residual: torch.Tensor | None,
        norm: ZeroCentredRMSNorm,
        forward_batch: ForwardBatch,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """positions [T], both [T, hidden_size] -> the output for the sum's norm, summed over the ranks; the sum."""
        qkv, residual = self.project(hidden_states, residual, norm)
        # After the product: a pool that is being loaded into is waited for here.
        places = places_to_write(self.attn.layer_id, qkv, forward_batch.out_cache_loc)
        q, k, v, gate = self.split(positions, qkv, places)
        return self.finish(self.attn(q, k, v, forward_batch, save_kv_cache=places is None), gate), residual


def places_to_write(layer_id: int, qkv: torch.Tensor, slots: torch.Tensor) -> Places | None:
    """Where the layer's keys and values go, in one page of all slots, or None: SGLang writes them.

    Ours are plain pools of the activations' dtype. Others quantise, translate slots or have another layout. A step
    that torch.compile traces is SGLang's, too: there, padding is cut off inside its attention.
    """
    pool: Any = getattr(get_attn_backend(), "token_to_kv_pool", None)
    held: Any = getattr(pool, "full_kv_pool", pool)
    plain = (
        type(held) is MHATokenToKVPool and held.kv_cache_layout == "nhd" and held.dtype == held.store_dtype == qkv.dtype
    )
    if not plain or slots.dtype != torch.int64 or not slots.is_contiguous() or torch.compiler.is_compiling():
        return None
    keys, values = pool.get_kv_buffer(layer_id)
    return Places(keys[None], values[None], slots, first_slot=_FIRST)
