"""The model's shape and rope table as SGLang's layers ask for them."""

from __future__ import annotations

import torch
from transformers import PretrainedConfig

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.rope import shared_cos_sin

from .names import get_model, get_spec

# On a CPU SGLang pads these to what its own kernels and several ranks like, and keeps the checkpoint's beside them.
_PADDED_ON_CPU = {
    "num_attention_heads": "original_num_attention_heads",
    "num_key_value_heads": "original_total_num_kv_heads",
    "moe_intermediate_size": "original_moe_intermediate_size",
    "intermediate_size": "original_intermediate_size",
    "shared_expert_intermediate_size": "original_shared_expert_intermediate_size",
}


def spec_of(config: PretrainedConfig) -> Qwen3NextSpec:
    """The checked spec of the model (or of the drafter, which shares its config), overrides applied, sizes unpadded."""
    values = config.to_dict()
    return parse_config(values | {name: values[kept] for name, kept in _PADDED_ON_CPU.items() if kept in values})


def cos_sin_table(spec: Qwen3NextSpec) -> torch.Tensor:
    """Rotary table [P, rotary_dim] fp32 for every position the server can reach; one tensor for all layers."""
    positions = max(spec.max_position_embeddings, get_model().context_length or 0) + _drafted_positions()
    return shared_cos_sin(spec.rope, spec.attention.rotary_dim, positions, str(torch.get_default_device()))


def _drafted_positions() -> int:
    """Positions past the end of a context that drafts may be given before the request is cut."""
    speculative = get_spec()
    steps, tokens = speculative.speculative_num_steps or 0, speculative.speculative_num_draft_tokens or 0
    return steps * tokens
