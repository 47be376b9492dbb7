"""One decoder layer: a token mixer (Gated DeltaNet or gated attention), then experts or a plain MLP."""

from __future__ import annotations

import torch

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec
from qwen3next_plugin.layers import DecoderLayer
from qwen3next_plugin.layers_base import ParallelLayers

from .attention import Qwen3NextGatedAttention
from .gdn_layer import Qwen3NextGdnLayer


def decoder_layer(
    spec: Qwen3NextSpec,
    layers: ParallelLayers,
    layer_id: int,
    cos_sin: torch.Tensor,
    prefix: str,
    *,
    kind: LayerKind,
    dense: bool,
) -> DecoderLayer:
    """A layer called with positions, hidden states, residual and the ForwardBatch."""
    mixer: Qwen3NextGdnLayer | Qwen3NextGatedAttention
    if kind is LayerKind.LINEAR:
        mixer = Qwen3NextGdnLayer(spec, layers, layer_id, f"{prefix}.linear_attn")
    else:
        mixer = Qwen3NextGatedAttention(spec, layers, layer_id, cos_sin, f"{prefix}.self_attn")
    return DecoderLayer(spec, layers, kind, mixer, dense=dense, prefix=prefix)
