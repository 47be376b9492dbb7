"""Qwen3-Next for SGLang, built from SGLang's parallel layers and attention and from this plugin's layers."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn
from transformers import PretrainedConfig

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .activation import announce
from .causal_lm import CausalLM
from .decoder import decoder_layer
from .moe import parallel_layers
from .spec import cos_sin_table


class Qwen3NextModel(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(self, spec: Qwen3NextSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        cos_sin = cos_sin_table(spec)
        layers = parallel_layers(spec, quant_config)
        self.layers = nn.ModuleList(
            decoder_layer(spec, layers, i, cos_sin, f"{prefix}.layers.{i}", kind=kind, dense=i in spec.dense_layers)
            for i, kind in enumerate(spec.layer_kinds)
        )
        self.norm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """input_ids and positions [T] (or input_embeds [T, hidden_size]) -> [T, hidden_size]."""
        hidden_states = self.embed_tokens(input_ids) if input_embeds is None else input_embeds
        residual = None
        for layer in self.layers:
            hidden_states, residual = layer(positions, hidden_states, residual, forward_batch)
        hidden_states, _ = self.norm.add(hidden_states, residual)
        return hidden_states


class Qwen3NextForCausalLM(CausalLM):
    """The architecture name that checkpoints carry, so that SGLang builds this class for them."""

    scope = "model"
    body = Qwen3NextModel

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        announce(config, quant_config)
        super().__init__(config, quant_config, prefix)
        if self.spec.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
