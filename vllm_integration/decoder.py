"""One decoder layer: a token mixer (Gated DeltaNet or gated attention), then experts or a plain MLP."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec
from qwen3next_plugin.layers import DecoderLayer

from .attention import Qwen3NextGatedAttention
from .gdn_layer import Qwen3NextGdnLayer
from .moe import parallel_layers


def decoder_layer(
    spec: Qwen3NextSpec, vllm_config: VllmConfig, cos_sin: torch.Tensor, prefix: str, *, kind: LayerKind, dense: bool
) -> DecoderLayer:
    """A layer called with positions, hidden states and residual."""
    layers = parallel_layers(spec, vllm_config)
    mixer: Qwen3NextGdnLayer | Qwen3NextGatedAttention
    if kind is LayerKind.LINEAR:
        mixer = Qwen3NextGdnLayer(spec, vllm_config, layers, f"{prefix}.linear_attn")
    else:
        mixer = Qwen3NextGatedAttention(spec, vllm_config, layers, cos_sin, f"{prefix}.self_attn")
    return DecoderLayer(spec, layers, kind, mixer, dense=dense, prefix=prefix)
