"""quantization_config as AutoAWQ, GPTQ's tools and llm-compressor write it: what is understood, and what is refused."""

import copy
from typing import Any

import pytest

from qwen3next_plugin.config import IntegerFormat, QuantSpec, parse_config
from qwen3next_plugin.errors import ConfigError
from tests.configs import new_form

GATE = "model.layers.0.mlp.gate"
EXPERT = "model.layers.7.mlp.experts.3.down_proj"

AWQ = {
    "quant_method": "awq",
    "bits": 4,
    "group_size": 128,
    "zero_point": True,
    "version": "gemm",
    "modules_to_not_convert": ["shared_expert", "mlp.gate"],
}
GPTQ = {
    "quant_method": "gptq",
    "bits": 4,
    "group_size": 32,
    "sym": True,
    "desc_act": False,
    "damp_percent": 0.05,
    "true_sequential": True,
    "checkpoint_format": "gptq",
    "lm_head": False,
    "pack_dtype": "int32",
    "dynamic": {"-:.*shared_expert.*": {}, r"-:.*mlp\.gate$": {}, "+:.*experts.*": {"bits": 4}},
    "meta": {"quantizer": ["gptqmodel:5.7.0"]},
}
W4A16: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "global_compression_ratio": None,
    "kv_cache_scheme": None,
    "sparsity_config": {},
    "transform_config": {},
    "ignore": ["lm_head", GATE, "re:.*linear_attn.*", r"re:.*shared_expert_gate$"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "format": "pack-quantized",
            "weights": {
                "num_bits": 4,
                "type": "int",
                "strategy": "group",
                "group_size": 32,
                "symmetric": True,
                "dynamic": False,
                "actorder": None,
                "observer": "mse",
            },
            "input_activations": None,
            "output_activations": None,
        }
    },
}
TOKENS = {"num_bits": 8, "type": "int", "strategy": "token", "symmetric": True, "dynamic": True}


def changed(section: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of a section with one field, given by its dotted path, set (None: to null)."""
    section = copy.deepcopy(section)
    *parents, last = path.split(".")
    place = section
    for parent in parents:
        place = place[parent]
    place[last] = value
    return section


W8A8 = changed(W4A16, "format", "int-quantized")
W8A8 = changed(W8A8, "config_groups.group_0.format", None)
W8A8 = changed(W8A8, "config_groups.group_0.weights", {"num_bits": 8, "type": "int", "strategy": "channel"})
W8A8 = changed(W8A8, "config_groups.group_0.input_activations", TOKENS)


def parsed(section: dict[str, Any]) -> QuantSpec:
    quant = parse_config(new_form(quantization_config=section)).quant
    assert quant is not None
    return quant


def test_awq() -> None:
    quant = parsed(AWQ)
    assert quant.integer_format(EXPERT) == IntegerFormat("awq", 4, 128, symmetric=False)
    for module in (
        GATE,
        "model.layers.1.mlp.shared_expert.up_proj",
        "model.layers.1.mlp.shared_expert_gate",
        "lm_head",
    ):
        assert quant.integer_format(module) is None and quant.is_ignored(module)
    old = {"quant_method": "awq", "w_bit": 4, "q_group_size": 64, "zero_point": True, "version": "GEMM"}
    assert parsed(old).integer_format(GATE) == IntegerFormat("awq", 4, 64, symmetric=False)


def test_gptq() -> None:
    quant = parsed(GPTQ)
    assert quant.integer_format(EXPERT) == IntegerFormat("gptq", 4, 32)
    for module in (GATE, "model.layers.1.mlp.shared_expert.up_proj", "lm_head"):
        assert quant.integer_format(module) is None
    assert quant.integer_format("model.layers.0.mlp.gate_proj") is not None
    for path, value, expected in (
        ("group_size", -1, IntegerFormat("gptq", 4, None)),
        ("checkpoint_format", "gptq_v2", IntegerFormat("gptq_v2", 4, 32)),
        ("sym", False, IntegerFormat("gptq", 4, 32, symmetric=False)),
    ):
        assert parsed(changed(GPTQ, path, value)).integer_format(EXPERT) == expected
    eight = changed(changed(GPTQ, "bits", 8), "dynamic", {})
    assert parsed(eight).integer_format(EXPERT) == IntegerFormat("gptq", 8, 32)
    listed = changed(GPTQ, "modules_in_block_to_quantize", [["self_attn.q_proj", "self_attn.k_proj"], ["o_proj"]])
    quant = parsed(listed)
    assert quant.integer_format("model.layers.3.self_attn.o_proj") is not None
    assert quant.integer_format("model.layers.3.self_attn.v_proj") is None
    assert quant.integer_format(EXPERT) is None


def test_compressed_tensors() -> None:
    quant = parsed(W4A16)
    assert quant.integer_format(EXPERT) == IntegerFormat("pack-quantized", 4, 32)
    for module in (GATE, "lm_head", "model.layers.0.linear_attn.out_proj", "mtp.layers.0.mlp.shared_expert_gate"):
        assert quant.integer_format(module) is None
    assert quant.integer_format("model.layers.1.mlp.gate") is not None, "names are whole names"
    assert parsed(W8A8).integer_format(EXPERT) == IntegerFormat("int-quantized", 8, None, quantize_activations=True)
    alone = changed(W8A8, "config_groups.group_0.input_activations", None)
    assert parsed(alone).integer_format(EXPERT) == IntegerFormat("int-quantized", 8, None)


def test_the_more_specific_group_of_modules_counts() -> None:
    section = changed(W4A16, "config_groups.named", copy.deepcopy(W4A16["config_groups"]["group_0"]))
    section["config_groups"]["named"]["targets"] = ["model.layers.3.self_attn.q_proj"]
    section["config_groups"]["named"]["weights"]["group_size"] = 64
    section["config_groups"]["matched"] = copy.deepcopy(section["config_groups"]["named"])
    section["config_groups"]["matched"]["targets"] = ["re:.*self_attn.*"]
    section["config_groups"]["matched"]["weights"] |= {"group_size": 16}
    quant = parsed(section)
    sizes = [
        found.group_size
        for part in ("q_proj", "k_proj")
        if (found := quant.integer_format(f"model.layers.3.self_attn.{part}"))
    ]
    found = quant.integer_format(EXPERT)
    assert sizes == [64, 16] and found is not None and found.group_size == 32


GROUP = "config_groups.group_0"
REFUSED: dict[str, tuple[dict[str, Any], str, Any, str, str]] = {
    "awq bits": (AWQ, "bits", 3, "quantization_config.bits is 3", "4 bits"),
    "awq without bits": (AWQ, "bits", None, "quantization_config.bits is null", "integer"),
    "awq version": (AWQ, "version", "gemv", "quantization_config.version", "gemm"),
    "awq without zero points": (AWQ, "zero_point", False, "quantization_config.zero_point is false", "gemm writes"),
    "awq group": (AWQ, "group_size", 8, "quantization_config.group_size is 8", "multiple of 16"),
    "awq modules": (AWQ, "modules_to_not_convert", "gate", "quantization_config.modules_to_not_convert", "list"),
    "gptq bits": (GPTQ, "bits", 3, "quantization_config.bits is 3", "4 or 8"),
    "gptq 8 bits with zero points": (
        changed(changed(GPTQ, "bits", 8), "dynamic", {}),
        "sym",
        False,
        "sym is false with bits 8",
        "sym true",
    ),
    "gptq format": (GPTQ, "checkpoint_format", "marlin", "checkpoint_format is 'marlin'", "gptq, gptq_v2"),
    "gptq head": (GPTQ, "lm_head", True, "quantization_config.lm_head is true", "lm_head false"),
    "gptq rule": (
        *(GPTQ, "dynamic", {"+:.*experts.*": {"bits": 8, "group_size": 32}}),
        *("quantization_config.dynamic changes bits for '+:.*experts.*'", "leave modules out"),
    ),
    "gptq expression": (GPTQ, "dynamic", {"-:*": {}}, "quantization_config.dynamic has '*', no regular", "belongs"),
    "gptq modules": (GPTQ, "modules_in_block_to_quantize", [[1]], "modules_in_block_to_quantize is [[1]]", "names"),
    "no groups": (W4A16, "config_groups", {}, "quantization_config.config_groups is missing", "belongs"),
    "float weights": (W4A16, f"{GROUP}.weights.type", "float", f"{GROUP}.weights.type is 'float'", "int"),
    "two bits": (W4A16, f"{GROUP}.weights.num_bits", 2, f"{GROUP}.weights.num_bits is 2", "4 or 8 bits"),
    "8 bits with zero points": (
        *(changed(W8A8, f"{GROUP}.input_activations", None), f"{GROUP}.weights.symmetric", False),
        *(f"{GROUP}.weights.symmetric is false with 8 bits", "4 bits with either"),
    ),
    "4 bits unpacked": (W8A8, f"{GROUP}.weights.num_bits", 4, "num_bits is 4 in format int-quantized", "of 8"),
    "a format of other bits": (
        W4A16,
        f"{GROUP}.format",
        "marlin-24",
        f"{GROUP}.format is 'marlin-24'",
        "pack-quantized",
    ),
    "activation order": (
        W4A16,
        f"{GROUP}.weights.actorder",
        "group",
        "weights.actorder is 'group'",
        '"weight" or null',
    ),
    "strategy": (W4A16, f"{GROUP}.weights.strategy", "block", "weights.strategy is 'block'", "group, channel"),
    "group": (W4A16, f"{GROUP}.weights.group_size", 0, "weights.group_size is 0", "multiple of 16"),
    "activations beside 4 bits": (W4A16, f"{GROUP}.input_activations", TOKENS, "input_activations is given", "W8A8"),
    "static activations": (W8A8, f"{GROUP}.input_activations.dynamic", False, "dynamic is False", "dynamic True"),
    "asymmetric activations": (W8A8, f"{GROUP}.input_activations.symmetric", False, "symmetric is False", "True"),
    "activations of tensors": (W8A8, f"{GROUP}.input_activations.strategy", "tensor", "strategy is 'tensor'", "token"),
    "outputs": (W4A16, f"{GROUP}.output_activations", TOKENS, f"{GROUP}.output_activations is given", "drop it"),
    "cache": (W4A16, "kv_cache_scheme", {"num_bits": 8}, "quantization_config.kv_cache_scheme is given", "drop it"),
    "sparsity": (W4A16, "sparsity_config", {"format": "sparse-bitmask"}, "sparsity_config is given", "dense"),
    "transforms": (W4A16, "transform_config", {"config_groups": {}}, "transform_config is given", "without transforms"),
    "ignored expression": (W4A16, "ignore", ["re:("], "quantization_config.ignore has '('", "belongs"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_served_is_refused_by_its_field(name: str) -> None:
    section, path, value, found, remedy = REFUSED[name]
    parsed(section)
    with pytest.raises(ConfigError) as caught:
        parsed(changed(section, path, value))
    sentence = str(caught.value)
    assert found in sentence and remedy in sentence, sentence
    assert "\n" not in sentence and sentence.endswith(".")


def test_harmless_fields_of_the_tools_are_passed_over() -> None:
    sparse = changed(W4A16, "sparsity_config", {"format": "dense"})
    assert parsed(sparse) == parsed(W4A16)
    assert parsed(changed(W4A16, f"{GROUP}.weights.actorder", "weight")) == parsed(W4A16)
    assert parsed(changed(GPTQ, "desc_act", True)) == parsed(GPTQ), "g_idx says whether columns are reordered"
