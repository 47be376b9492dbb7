"""One decoder layer: a token mixer (Gated DeltaNet or gated attention), then experts or a plain MLP."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec
from qwen3next_plugin.layers import DecoderParts

from .attention import Qwen3NextGatedAttention
from .gdn_layer import Qwen3NextGdnLayer
from .moe import Qwen3NextMLP, Qwen3NextMoE


class Qwen3NextDecoderLayer(DecoderParts):
    """Called with positions, hidden states and residual."""

    def __init__(
        self,
        spec: Qwen3NextSpec,
        vllm_config: VllmConfig,
        *,
        kind: LayerKind,
        dense: bool,
        cos_sin: torch.Tensor,
        prefix: str,
    ) -> None:
        mixer: nn.Module
        if kind is LayerKind.LINEAR:
            mixer = Qwen3NextGdnLayer(spec, vllm_config, prefix=f"{prefix}.linear_attn")
        else:
            mixer = Qwen3NextGatedAttention(spec, vllm_config, cos_sin, prefix=f"{prefix}.self_attn")
        mlp: nn.Module
        if dense:
            width = spec.intermediate_size
            mlp = Qwen3NextMLP(spec, width, vllm_config, prefix=f"{prefix}.mlp", reduce_results=True)
        else:
            mlp = Qwen3NextMoE(spec, vllm_config, prefix=f"{prefix}.mlp")
        super().__init__(spec, kind, mixer, mlp)
