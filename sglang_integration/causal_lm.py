"""What the model and its drafter are alike in: a body between one embedding and one head that they share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from sglang.srt.layers.logits_processor import LogitsProcessor, LogitsProcessorOutput
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead
from sglang.srt.model_executor.forward_batch_info import ForwardBatch
from torch import nn
from transformers import PretrainedConfig

from qwen3next_plugin.weights_map import Scope

from .loading import load_weights
from .refusal import refusing
from .spec import spec_of


class CausalLM(nn.Module):
    """A body of layers, the head, and what SGLang asks of both: logits, weights, an embedding and a head to share."""

    scope: ClassVar[Scope]
    """Which of the checkpoint's tensors are loaded, and their modules' prefix."""
    body: ClassVar[type[Any]]
    """Made of the spec, the quantisation config and a prefix; has ``embed_tokens``."""

    # How quantisation configs that name the checkpoint's modules find the fused ones.
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }
    # A directory without safetensors is an error, not a reason to unpickle.
    fall_back_to_pt_during_load = False

    @refusing
    def __init__(
        self, config: PretrainedConfig, quant_config: QuantizationConfig | None = None, prefix: str = ""
    ) -> None:
        super().__init__()
        self.config = config
        self.quant_config = quant_config
        if quant_config is not None and hasattr(quant_config, "packed_modules_mapping"):
            quant_config.packed_modules_mapping = self.packed_modules_mapping
        self.spec = spec_of(config)
        self.model = self.body(self.spec, quant_config, prefix=f"{prefix}.{self.scope}" if prefix else self.scope)
        self.lm_head = ParallelLMHead(self.spec.vocab_size, self.spec.hidden_size, prefix="lm_head")
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

    @refusing
    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.spec, self.scope)

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
