"""config.json for checkpoints of this project: named shapes in the layout of the published one."""

from typing import Any

from qwen3next_plugin.errors import SettingsError

# As published for Qwen/Qwen3-Next-80B-A3B-Instruct, but saying that there is an MTP layer, so that engines need not be
# told; small shapes say only how they differ.
PUBLISHED: dict[str, Any] = {
    "architectures": ["Qwen3NextForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "decoder_sparse_step": 1,
    "eos_token_id": 151645,
    "full_attention_interval": 4,
    "head_dim": 256,
    "hidden_act": "silu",
    "hidden_size": 2048,
    "initializer_range": 0.02,
    "intermediate_size": 5120,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "linear_value_head_dim": 128,
    "max_position_embeddings": 262144,
    "mlp_only_layers": [],
    "model_type": "qwen3_next",
    "moe_intermediate_size": 512,
    "norm_topk_prob": True,
    "num_attention_heads": 16,
    "num_experts": 512,
    "num_experts_per_tok": 10,
    "num_hidden_layers": 48,
    "num_key_value_heads": 2,
    "num_nextn_predict_layers": 1,
    "output_router_logits": False,
    "partial_rotary_factor": 0.25,
    "rms_norm_eps": 1e-6,
    "rope_scaling": None,
    "rope_theta": 10_000_000,
    "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 512,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "use_cache": True,
    "vocab_size": 151936,
}

_TINY: dict[str, Any] = {
    "head_dim": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "linear_key_head_dim": 32,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "max_position_embeddings": 4096,
    "moe_intermediate_size": 32,
    "num_attention_heads": 4,
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 4,
    "num_key_value_heads": 2,
    "shared_expert_intermediate_size": 32,
    "vocab_size": 320,
}

# Every size a FP8 block cuts is a multiple of 128, also with the experts of a layer split over two GPUs.
_BLOCKS: dict[str, Any] = {
    "head_dim": 128,
    "hidden_size": 256,
    "intermediate_size": 256,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
}

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": _TINY,
    # Its shared expert is wider than the others, so it cannot run as one of them, as it does elsewhere.
    "ratio1": _TINY | {"linear_num_key_heads": 4, "linear_num_value_heads": 4, "shared_expert_intermediate_size": 48},
    "ratio2": _TINY | {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "ratio4": _TINY | {"linear_num_key_heads": 2, "linear_num_value_heads": 8},
    "deep": _TINY | {"num_hidden_layers": 8, "num_experts": 16, "num_experts_per_tok": 4},
    "dense": _TINY | {"mlp_only_layers": [0, 3]},
    "blocks": _TINY | _BLOCKS,
    # What `qwen3next demo-checkpoint` ships: 1.9 million parameters, the proportions of the published model where
    # size allows.
    "demo": {
        "head_dim": 64,
        "hidden_size": 128,
        "intermediate_size": 256,
        "linear_key_head_dim": 32,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_value_head_dim": 32,
        "max_position_embeddings": 4096,
        "moe_intermediate_size": 64,
        "num_attention_heads": 4,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rope_theta": 1_000_000,
        "shared_expert_intermediate_size": 64,
        "vocab_size": 1024,
    },
    # The published layer shapes with few layers and experts: real kernels' sizes in 0.9 GB.
    "slice": {"num_hidden_layers": 4, "num_experts": 16, "vocab_size": 4096, "max_position_embeddings": 32768},
    "80b": {},
}


QUANTISATIONS = ("fp8", "awq", "gptq", "gptq-int8", "w4a16", "w8a16", "w8a8")


def config_of(
    shape: str, dtype: str = "bfloat16", fp8: bool = False, quantization: str | None = None, **overrides: Any
) -> dict[str, Any]:
    """The content of config.json for a named shape.

    Args:
        shape: a key of ``SHAPES``.
        dtype: ``bfloat16``, ``float16`` or ``float32``.
        fp8: the same as the quantisation "fp8".
        quantization: one of ``QUANTISATIONS``: FP8 in 128x128 blocks, AWQ, GPTQ in 4 or 8 bits, or compressed-tensors
            (the last three).
        overrides: fields of config.json to set on top.

    Raises:
        SettingsError: an unknown shape, dtype or quantisation.
    """
    if shape not in SHAPES:
        raise SettingsError(f"shape: {shape!r} is not known: use one of {', '.join(SHAPES)}.")
    if dtype not in ("bfloat16", "float16", "float32"):
        raise SettingsError(f"dtype: {dtype!r} cannot be written: use bfloat16, float16 or float32.")
    quantization = "fp8" if fp8 else quantization
    if quantization is not None and quantization not in QUANTISATIONS:
        raise SettingsError(f"quantization: {quantization!r} is not known: use one of {', '.join(QUANTISATIONS)}.")
    config = PUBLISHED | SHAPES[shape] | {"torch_dtype": dtype} | overrides
    if config["vocab_size"] < PUBLISHED["vocab_size"]:
        # The tokenizer's three special tokens stand behind its 256 bytes: see tokenizer.byte_tokenizer.
        config |= {"bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256} | overrides
    if quantization is not None:
        config["quantization_config"] = _quantisation(quantization, config) | overrides.get("quantization_config", {})
    return config


def _quantisation(kind: str, config: dict[str, Any]) -> dict[str, Any]:
    """``quantization_config`` as the tools of that kind write it."""
    # Groups have to divide every layer's input.
    group = 128 if config["moe_intermediate_size"] % 128 == 0 else 32
    if kind == "fp8":
        return {
            "activation_scheme": "dynamic",
            "fmt": "e4m3",
            "modules_to_not_convert": _unquantised(config),
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
        }
    if kind == "awq":
        return {
            "bits": 4,
            "group_size": group,
            "modules_to_not_convert": ["in_proj_ba", "mlp.gate", "shared_expert_gate", "mtp"],
            "quant_method": "awq",
            "version": "gemm",
            "zero_point": True,
        }
    if kind.startswith("gptq"):
        return {
            "bits": 8 if kind == "gptq-int8" else 4,
            "checkpoint_format": "gptq",
            "desc_act": False,
            "dynamic": {rf"-:.*{part}$": {} for part in ("in_proj_ba", r"mlp\.gate", "shared_expert_gate")},
            "group_size": group,
            "lm_head": False,
            "quant_method": "gptq",
            "sym": True,
        }
    weights = {"num_bits": 4 if kind == "w4a16" else 8, "type": "int", "symmetric": True, "dynamic": False}
    weights |= {"strategy": "group", "group_size": group} if kind == "w4a16" else {"strategy": "channel"}
    activations = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return {
        "config_groups": {
            "group_0": {
                "input_activations": activations if kind == "w8a8" else None,
                "output_activations": None,
                "targets": ["Linear"],
                "weights": weights,
            }
        },
        "format": "int-quantized" if kind == "w8a8" else "pack-quantized",
        # W8A16 shows what is done about a quantised head.
        "ignore": ["lm_head"] * (kind != "w8a16") + ["re:.*shared_expert_gate$"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def _unquantised(config: dict[str, Any]) -> list[str]:
    """The modules that an FP8 checkpoint leaves alone: head, routers, gates, the small b/a projection and the MTP
    layer's ``fc``."""
    names = ["lm_head"]
    interval = config["full_attention_interval"]
    for i in range(config["num_hidden_layers"]):
        linear = ["linear_attn.conv1d", "linear_attn.in_proj_ba"] if (i + 1) % interval else []
        names += [f"model.layers.{i}.{tail}" for tail in (*linear, "mlp.gate", "mlp.shared_expert_gate")]
    if config["num_nextn_predict_layers"]:
        names += ["mtp.fc", "mtp.layers.0.mlp.gate", "mtp.layers.0.mlp.shared_expert_gate"]
    return names
