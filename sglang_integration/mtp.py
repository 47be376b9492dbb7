"""The MTP (multi-token prediction) drafter for SGLang's NEXTN."""

from __future__ import annotations

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import VocabParallelEmbedding
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .causal_lm import CausalLM
from .decoder import decoder_layer
from .moe import parallel_layers
from .spec import cos_sin_table


class Qwen3NextPredictor(nn.Module):
    """fc([norm(embedding of the next token) | norm(hidden state)]), one attention layer, a norm of its own."""

    def __init__(self, spec: Qwen3NextSpec, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        layers, cos_sin, name = parallel_layers(spec, quant_config), cos_sin_table(spec), f"{prefix}.layers.0"
        self.fc = layers.replicated(2 * spec.hidden_size, spec.hidden_size, **layers.options(f"{prefix}.fc"))
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


class Qwen3NextForCausalLMMTP(CausalLM):
    """The drafter architecture that SGLang derives for this model."""

    scope = "mtp"
    body = Qwen3NextPredictor
