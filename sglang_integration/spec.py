"""The model's shape and rope table as SGLang's layers ask for them."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.rope import shared_cos_sin

from .names import get_model, get_spec


def spec_of(config: PretrainedConfig) -> Qwen3NextSpec:
    """The checked spec of the model (or of the drafter, which shares its config), overrides applied."""
    return parse_config(config)


def cos_sin_table(spec: Qwen3NextSpec) -> torch.Tensor:
    """Rotary table [P, rotary_dim] fp32 for every position the server can reach; one tensor for all layers."""
    positions = max(spec.max_position_embeddings, get_model().context_length or 0) + _drafted_positions()
    return shared_cos_sin(spec.rope, spec.attention.rotary_dim, positions, str(torch.get_default_device()))


def _drafted_positions() -> int:
    """Positions past the end of a context that drafts may be given before the request is cut."""
    speculative = get_spec()
    steps, tokens = speculative.speculative_num_steps or 0, speculative.speculative_num_draft_tokens or 0
    return steps * tokens
