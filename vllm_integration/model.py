"""Qwen3-Next for vLLM, built from vLLM's parallel layers and attention and from this plugin's layers.

vLLM caches the interface flags of the class below, keyed by this file's text: they stay in this file.
"""

from collections.abc import Iterable
from itertools import islice

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.mamba.mamba_utils import MambaStateCopyFunc, MambaStateCopyFuncCalculator
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import HasInnerState, IsHybrid, SupportsPP
from vllm.model_executor.models.utils import (
    PPMissingLayer,
    extract_layer_index,
    make_empty_intermediate_tensors_factory,
    make_layers,
    maybe_prefix,
)
from vllm.sequence import IntermediateTensors

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import DecoderLayer
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm

from .activation import announce
from .decoder import decoder_layer
from .gdn_layer import gdn_state_dtype, gdn_state_shape
from .loading import load_weights
from .spec import cos_sin_table, spec_of
from .warmup import warm_up_before_serving


@support_torch_compile
class Qwen3NextModel(nn.Module):
    """Embedding, decoder layers and the last norm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        spec = spec_of(vllm_config)
        self.spec = spec
        self.embed_tokens = VocabParallelEmbedding(spec.vocab_size, spec.hidden_size)
        cos_sin = cos_sin_table(spec, vllm_config)

        def layer(prefix: str) -> DecoderLayer:
            index = extract_layer_index(prefix)
            kind, dense = spec.layer_kinds[index], index in spec.dense_layers
            return decoder_layer(spec, vllm_config, cos_sin, prefix, kind=kind, dense=dense)

        self.start_layer, self.end_layer, self.layers = make_layers(spec.num_layers, layer, prefix=f"{prefix}.layers")
        self.make_empty_intermediate_tensors = make_empty_intermediate_tensors_factory(
            ["hidden_states", "residual"], spec.hidden_size
        )
        last = get_pp_group().is_last_rank
        self.norm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps) if last else PPMissingLayer()

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor | IntermediateTensors:
        residual = None
        if not get_pp_group().is_first_rank:
            assert intermediate_tensors is not None
            hidden_states, residual = intermediate_tensors["hidden_states"], intermediate_tensors["residual"]
        else:
            assert input_ids is not None or inputs_embeds is not None
            hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in islice(self.layers, self.start_layer, self.end_layer):
            hidden_states, residual = layer(positions, hidden_states, residual)
        if not get_pp_group().is_last_rank:
            return IntermediateTensors({"hidden_states": hidden_states, "residual": residual})
        hidden_states, _ = self.norm.add(hidden_states, residual)
        return hidden_states


class Qwen3NextForCausalLM(nn.Module, HasInnerState, SupportsPP, IsHybrid):
    """The architecture name that checkpoints carry, so that vLLM builds this class for them."""

    # How quantisation configs that name the checkpoint's modules find the fused ones.
    packed_modules_mapping = {
        "qkv_proj": ["q_proj", "k_proj", "v_proj"],
        "gate_up_proj": ["gate_proj", "up_proj"],
    }

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config = vllm_config.model_config.hf_text_config
        self.spec: Qwen3NextSpec = spec_of(vllm_config)
        announce(vllm_config)
        warm_up_before_serving()
        self.model = Qwen3NextModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        self.lm_head = ParallelLMHead(
            self.spec.vocab_size, self.spec.hidden_size, prefix=maybe_prefix(prefix, "lm_head")
        )
        if self.spec.tie_word_embeddings:
            self.lm_head = self.lm_head.tie_weights(self.model.embed_tokens)
        self.logits_processor = LogitsProcessor(self.spec.vocab_size)
        self.make_empty_intermediate_tensors = self.model.make_empty_intermediate_tensors

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: object,
    ) -> torch.Tensor | IntermediateTensors:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        return self.logits_processor(self.lm_head, hidden_states)

    @classmethod
    def get_mamba_state_dtype_from_config(cls, vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
        return gdn_state_dtype(vllm_config)

    @classmethod
    def get_mamba_state_shape_from_config(cls, vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return gdn_state_shape(spec_of(vllm_config), vllm_config)

    @classmethod
    def get_mamba_state_copy_func(cls) -> tuple[MambaStateCopyFunc, MambaStateCopyFunc]:
        return MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func()

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        return load_weights(self, weights, self.spec, "model")
