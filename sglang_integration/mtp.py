"""The MTP (multi-token prediction) drafter for SGLang's NEXTN."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from sglang.srt.layers.linear import ReplicatedLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn
from transformers import PretrainedConfig

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .decoder import decoder_layer
from .loading import load_weights
from .model import SharedEmbeddingAndHead
from .moe import parallel_layers
from .spec import cos_sin_table


class Qwen3NextPredictor(nn.Module):
    """fc([norm(embedding of the next token) | norm(hidden state)]), one attention layer, a norm of its own."""

    def __init__(self, spec: Qwen3NextSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        self.fc = ReplicatedLinear(
            2 * spec.hidden_size, spec.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.fc"
        )
        layers, cos_sin, name = parallel_layers(quant_config), cos_sin_table(spec), f"{prefix}.layers.0"
        self.layers = nn.ModuleList([decoder_layer(spec, layers, 0, cos_sin, name, kind=LayerKind.FULL, dense=False)])
        self.pre_fc_norm_embedding = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.pre_fc_norm_hidden = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.norm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        forward_batch: ForwardBatch,
        input_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Reads hidden states [T, hidden_size] from the batch: the main model's, or its own when it drafts further.

        From the batch, because SGLang captures this function for prefill with these four arguments and keeps what the
        batch holds, not what a caller would pass, at fixed addresses.
        """
        if input_embeds is None:
            input_embeds = self.embed_tokens(input_ids)
        hidden_states = forward_batch.spec_info.hidden_states
        joined = torch.cat([self.pre_fc_norm_embedding(input_embeds), self.pre_fc_norm_hidden(hidden_states)], dim=-1)
        mixed, _ = self.fc(joined)
        hidden_states, residual = self.layers[0](positions, mixed, None, forward_batch)
        hidden_states, _ = self.norm.add(hidden_states, residual)
        return hidden_states


class Qwen3NextForCausalLMMTP(SharedEmbeddingAndHead):
    """The drafter architecture that SGLang derives for this model."""

    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__(config, quant_config)
        spec = self.spec
        self.model = Qwen3NextPredictor(spec, quant_config, prefix=f"{prefix}.mtp" if prefix else "mtp")
        self.lm_head = ParallelLMHead(spec.vocab_size, spec.hidden_size, prefix="lm_head")
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
        return load_weights(self, weights, self.spec, "mtp")
