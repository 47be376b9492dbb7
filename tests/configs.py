"""Small, right config.json contents in both spellings, for tests to start from."""

from typing import Any

Config = dict[str, Any]

_COMMON: Config = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "decoder_sparse_step": 1,
    "head_dim": 32,
    "hidden_act": "silu",
    "hidden_size": 64,
    "intermediate_size": 96,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 16,
    "max_position_embeddings": 1024,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 32,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "shared_expert_intermediate_size": 48,
    "tie_word_embeddings": False,
    "vocab_size": 128,
}


def old_form(**changes: Any) -> Config:
    """As transformers 4.57 wrote it: an interval, the rotary fields at the top level."""
    rotary = {"rope_theta": 10000000, "rope_scaling": None, "partial_rotary_factor": 0.25}
    return _COMMON | {"full_attention_interval": 4, "torch_dtype": "bfloat16"} | rotary | changes


def new_form(**changes: Any) -> Config:
    """As transformers 5 writes it: a list of layer types, one rotary dict (and the partial factor once more)."""
    rotary = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    layer_types = ["linear_attention"] * 3 + ["full_attention"]
    rest = {"layer_types": layer_types, "dtype": "bfloat16", "partial_rotary_factor": 0.25}
    return _COMMON | rest | {"rope_parameters": rotary} | changes


def rotary_place(config: Config) -> Config:
    """The dict in which a config spells rope_theta: its ``rope_parameters``, or its top level."""
    return config["rope_parameters"] if config.get("rope_parameters") else config
