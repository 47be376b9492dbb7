"""Ways to break a right config.json, of either spelling, with what the refusal has to say about each.

`BROKEN` drives the parser's own test; `SERVED` picks those worth a real server's start.
"""

from collections.abc import Callable
from dataclasses import dataclass

from tests.configs import Config, rotary_place


@dataclass(frozen=True)
class Broken:
    """``mutate`` breaks a config in place; the message must name ``field`` and give ``remedy``."""

    mutate: Callable[[Config], None]
    field: str
    remedy: str


def _set(field: str, value: object, remedy: str) -> Broken:
    return Broken(lambda config: config.update({field: value}), field, remedy)


def _drop(field: str, remedy: str) -> Broken:
    def mutate(config: Config) -> None:
        config.pop(field)

    return Broken(mutate, field, remedy)


def _set_rotary(field: str, value: object, remedy: str) -> Broken:
    return Broken(lambda config: _everywhere(config, field, value), field, remedy)


def _everywhere(config: Config, field: str, value: object) -> None:
    """Set a rotary field in each place where the config spells it; None takes it away."""
    for place in (config, rotary_place(config)):
        if field in place:
            place[field] = value


def _scaled(changes: Config, field: str, remedy: str) -> Broken:
    """A YaRN dict that would be right, but for ``changes``."""

    def mutate(config: Config) -> None:
        scaling = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256} | changes
        if config.get("rope_parameters"):
            config["rope_parameters"] |= scaling
        else:
            config["rope_scaling"] = scaling

    return Broken(mutate, field, remedy)


def _layer_types(mutate_list: Callable[[list[str]], None], remedy: str) -> Broken:
    def mutate(config: Config) -> None:
        interval = config.get("full_attention_interval", 4)
        names = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(_layers(config))]
        mutate_list(names)
        config["layer_types"] = names

    return Broken(mutate, "layer_types", remedy)


def _layers(config: Config) -> int:
    return int(config["num_hidden_layers"])


def _no_layer_kinds(config: Config) -> None:
    config.pop("layer_types", None)
    config.pop("full_attention_interval", None)


def _contradict_interval(config: Config) -> None:
    config["layer_types"] = ["full_attention"] + ["linear_attention"] * (_layers(config) - 1)
    config["full_attention_interval"] = 4


def _dense_without_size(config: Config) -> None:
    config["mlp_only_layers"] = [0]
    config.pop("intermediate_size", None)


def _odd_rotary(config: Config) -> None:
    _everywhere(config, "partial_rotary_factor", 3.5 / config["head_dim"])


def _uneven_heads(config: Config) -> None:
    config["num_attention_heads"] = config["num_key_value_heads"] * 2 + 1


def _uneven_linear_heads(config: Config) -> None:
    config["linear_num_value_heads"] = config["linear_num_key_heads"] * 2 + 1


def _two_rotary_dicts(config: Config) -> None:
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000000, "partial_rotary_factor": 0.25}
    config["rope_scaling"] = {"rope_type": "yarn", "factor": 2.0}


def _two_dtypes(config: Config) -> None:
    config["dtype"], config["torch_dtype"] = "bfloat16", "float16"


_INTEGER = "an integer of at least 1"

BROKEN: dict[str, Broken] = {
    "missing": _drop("hidden_size", _INTEGER),
    "null": _set("moe_intermediate_size", None, _INTEGER),
    "text for a number": _set("hidden_size", "64", _INTEGER),
    "float for a count": _set("num_hidden_layers", 4.0, _INTEGER),
    "bool for a count": _set("vocab_size", True, _INTEGER),
    "negative": _set("linear_key_head_dim", -16, _INTEGER),
    "zero layers": _set("num_hidden_layers", 0, _INTEGER),
    "no experts": _set("num_experts", 0, _INTEGER),
    "no context": _drop("max_position_embeddings", _INTEGER),
    "more experts a token than there are": _set("num_experts_per_tok", 100000, "at most num_experts"),
    "odd head_dim": _set("head_dim", 33, "even number"),
    "odd rotary": Broken(_odd_rotary, "partial_rotary_factor", "even number"),
    "rotary wider than the head": _set_rotary("partial_rotary_factor", 1.5, "at most 1"),
    "no partial rotary factor": _set_rotary("partial_rotary_factor", None, "or at the top level"),
    "no rope_theta": _set_rotary("rope_theta", None, "or at the top level"),
    "negative rope_theta": _set_rotary("rope_theta", -1.0, "above 0"),
    "unknown rope type": _scaled({"rope_type": "dynamic"}, "rope_type", "default, yarn"),
    "YaRN that shrinks": _scaled({"factor": 0.5}, "factor", "at least 1"),
    "YaRN factor as text": _scaled({"factor": "4"}, "factor", "a number above 0"),
    "YaRN with betas swapped": _scaled({"beta_fast": 1, "beta_slow": 32}, "beta_fast", "32 and 1"),
    "YaRN with a field of another library": _scaled({"attn_factor": 1.0}, "attn_factor", "attention_factor"),
    "two rotary dicts": Broken(_two_rotary_dicts, "rope_scaling.rope_type", "keep one"),
    "uneven attention heads": Broken(_uneven_heads, "num_attention_heads", "a multiple of num_key_value_heads"),
    "uneven linear heads": Broken(_uneven_linear_heads, "linear_num_value_heads", "multiple of linear_num_key_heads"),
    "unknown layer type": _layer_types(lambda names: names.__setitem__(0, "mamba"), "full_attention, linear_attention"),
    "too few layer types": _layer_types(lambda names: names.__delitem__(0), "one entry for each"),
    "layer types against the interval": Broken(_contradict_interval, "layer_types", "make the two agree"),
    "no layer kinds": Broken(_no_layer_kinds, "layer_types", "full_attention_interval"),
    "interval of zero": _set("full_attention_interval", 0, _INTEGER),
    "another activation": _set("hidden_act", "gelu", "silu"),
    "attention bias": _set("attention_bias", True, "false"),
    "another model": _set("model_type", "qwen3_moe", "qwen3_next"),
    "another architecture": _set("architectures", ["Qwen3MoeForCausalLM"], "Qwen3NextForCausalLM"),
    "architectures as text": _set("architectures", "Qwen3NextForCausalLM", "list of strings"),
    "eps of zero": _set("rms_norm_eps", 0.0, "above 0"),
    "convolution of one token": _set("linear_conv_kernel_dim", 1, "at least 2"),
    "two MTP layers": _set("num_nextn_predict_layers", 2, "give 0 or 1"),
    "integer dtype": _set("dtype", "int8", "bfloat16"),
    "two dtypes": Broken(_two_dtypes, "dtype", "drop one"),
    "dense layer that is not there": _set("mlp_only_layers", [99], "layers are numbered 0 to"),
    "dense layers as text": _set("mlp_only_layers", ["0"], "list of integers"),
    "sparse step of zero": _set("decoder_sparse_step", 0, _INTEGER),
    "dense layer without a size": Broken(_dense_without_size, "intermediate_size", _INTEGER),
    "tie as text": _set("tie_word_embeddings", "false", "true or false"),
    "quantisation as a list": _set("quantization_config", [1], "a dict"),
    "unknown quantisation": _set("quantization_config", {"quant_method": "q4_k"}, "fp8"),
    "FP8 with one block size": _set(
        "quantization_config", {"quant_method": "fp8", "weight_block_size": [128]}, "[128, 128]"
    ),
}

SERVED = (
    "missing",
    "text for a number",
    "negative",
    "more experts a token than there are",
    "odd head_dim",
    "uneven linear heads",
    "unknown layer type",
    "layer types against the interval",
    "another activation",
    "YaRN that shrinks",
)
