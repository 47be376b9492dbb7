"""Qwen3-Next for SGLang, built from SGLang's parallel layers and attention and from this plugin's layers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn
from transformers import PretrainedConfig

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .activation import announce
from .decoder import decoder_layer
from .loading import load_weights
from .moe import parallel_layers
from .spec import cos_sin_table, spec_of


class Qwen3NextModel(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(self, spec: Qwen3NextSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        cos_sin = cos_sin_table(spec)
        layers = parallel_layers(quant_config)
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


class SharedEmbeddingAndHead(nn.Module):
    """What SGLang asks of a target and a drafter to let them share one embedding and one head."""

    model: Any  # with embed_tokens
    lm_head: ParallelLMHead

    # How quantisation configs that name the checkpoint's modules find the fused ones.
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # A directory without safetensors is an error, not a reason to unpickle.
    fall_back_to_pt_during_load = False

    def __init__(self, config: PretrainedConfig, quant_config: QuantizationConfig | None) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        if quant_config is not None and hasattr(quant_config, "packed_modules_mapping"):
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.spec = spec_of(config)

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def get_embed_and_head(self) -> tuple[torch.Tensor, torch.Tensor]:
        return self.model.embed_tokens.weight, self.lm_head.weight

    def set_embed_and_head(self, embed: torch.Tensor, head: torch.Tensor) -> None:
        # Assigning over them would copy names, not free memory: the own ones go first.
        del self.model.embed_tokens.weight
        del self.lm_head.weight
        self.model.embed_tokens.weight = embed
        self.lm_head.weight = head
        if embed.is_cuda:
            torch.cuda.empty_cache()


class Qwen3NextForCausalLM(SharedEmbeddingAndHead):
    """The architecture name that checkpoints carry, so that SGLang builds this class for them."""

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config)
        announce()
        spec = self.spec
        self.model = Qwen3NextModel(spec, quant_config, prefix=f"{prefix}.model" if prefix else "model")
        self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, prefix="lm_head")
        if spec.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(config)

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> LogitsProcessorOutput:
        hidden_states = self.model(input_ids, positions, forward_batch, input_embeds)
        return self.logits_processor(input_ids, hidden_states, self.lm_head, forward_batch)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.spec, "model")
