"""The model's shape and rope table as vLLM's layers ask for them, each made once a process."""

from __future__ import annotations

import torch
from vllm.config import VllmConfig

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.rope import shared_cos_sin


def spec_of(vllm_config: VllmConfig) -> Qwen3NextSpec:
    """The checked spec of the model (or of the drafter, which shares its config), --hf-overrides applied."""
    return parse_config(vllm_config.model_config.hf_config)


def cos_sin_table(spec: Qwen3NextSpec, vllm_config: VllmConfig) -> torch.Tensor:
    """Rotary table [P, rotary_dim] fp32 for every position the server can reach; one tensor for all layers."""
    positions = max(spec.max_position_embeddings, vllm_config.model_config.max_model_len)
    return shared_cos_sin(spec.rope, spec.attention.rotary_dim, positions, str(torch.get_default_device()))
