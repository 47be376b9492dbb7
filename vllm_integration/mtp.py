"""The MTP (multi-token prediction) drafter for vLLM.

vLLM caches the interface flags of the class below, keyed by this file's text: they stay in this file.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.linear import ColumnParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.utils import maybe_prefix
from vllm.sequence import IntermediateTensors

from qwen3next_plugin.config import LayerKind
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .decoder import decoder_layer
from .left_out import keep_accepted_tokens_of_left_out_requests
from .loading import load_weights
from .moe import parallel_layers
from .spec import cos_sin_table, spec_of


@support_torch_compile
class Qwen3NextPredictor(nn.Module):
    """fc([norm(embedding of the next token) | norm(hidden state)]), one attention layer, a norm of its own."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        spec = spec_of(vllm_config)
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        layers, fc = parallel_layers(spec, vllm_config), f"{prefix}.fc"
        self.fc: nn.Module
        if layers.integer_format(fc) is not None:
            self.fc = layers.replicated(2 * spec.hidden_size, spec.hidden_size, **layers.options(fc))
        else:
            self.fc = ColumnParallelLinear(
                2 * spec.hidden_size, spec.hidden_size, gather_output=True, **layers.options(fc)
            )
        cos_sin, name = cos_sin_table(spec, vllm_config), f"{prefix}.layers.0"
        layer = decoder_layer(spec, vllm_config, cos_sin, name, kind=LayerKind.FULL, dense=False)
        self.layers = nn.ModuleList([layer])
        self.pre_fc_norm_embedding = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.pre_fc_norm_hidden = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.norm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            inputs_embeds = self.embed_input_ids(input_ids)
        joined = torch.cat([self.pre_fc_norm_embedding(inputs_embeds), self.pre_fc_norm_hidden(hidden_states)], dim=-1)
        hidden_states, residual = self.layers[0](positions, self.fc(joined)[0], None)
        hidden_states, _ = self.norm.add(hidden_states, residual)
        return hidden_states


class Qwen3NextMTP(nn.Module):
    """The drafter architecture that vLLM derives for this model."""

    # vLLM then shares the main model's; under pipeline parallelism, where it cannot, the loaded ones stay.
    has_own_embed_tokens = False
    has_own_lm_head = False

    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        keep_accepted_tokens_of_left_out_requests()
        self.config = vllm_config.model_config.hf_config
        self.spec = spec_of(vllm_config)
        self.model = Qwen3NextPredictor(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "mtp"))
        self.lm_head = ParallelLMHead(
            self.spec.vocab_size, self.spec.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        self.logits_processor = LogitsProcessor(self.spec.vocab_size)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        hidden_states: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor:
        """hidden_states [T, hidden_size]: the main model's, or this model's own when it drafts another token ahead."""
        return self.model(input_ids, positions, hidden_states, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor, spec_step_idx: int = 0) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.spec, "mtp")
