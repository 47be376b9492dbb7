"""config.json to spec: both spellings, what transformers writes, and one clear sentence for each broken field."""

import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig

from qwen3next_plugin.config import LayerKind, QuantSpec, load_spec, parse_config
from qwen3next_plugin.errors import ConfigError
from tests.broken_configs import BROKEN, SERVED
from tests.configs import new_form, old_form

FORMS = {"4.57": old_form, "5": new_form}


def test_reads_the_published_80b_config() -> None:
    published = old_form(
        head_dim=256,
        hidden_size=2048,
        intermediate_size=5120,
        linear_key_head_dim=128,
        linear_num_key_heads=16,
        linear_num_value_heads=32,
        linear_value_head_dim=128,
        max_position_embeddings=262144,
        moe_intermediate_size=512,
        num_attention_heads=16,
        num_experts=512,
        num_experts_per_tok=10,
        num_hidden_layers=48,
        shared_expert_intermediate_size=512,
        vocab_size=151936,
    )
    spec = parse_config(published)
    assert (spec.num_layers, spec.layer_kinds.count(LayerKind.FULL), spec.layer_kinds[3]) == (48, 12, LayerKind.FULL)
    assert (spec.gdn.key_dim, spec.gdn.value_dim, spec.gdn.conv_dim, spec.gdn.heads_per_group) == (2048, 4096, 8192, 2)
    assert (spec.attention.rotary_dim, spec.attention.head_dim, spec.attention.num_kv_heads) == (64, 256, 2)
    assert (spec.moe.num_experts, spec.moe.top_k, spec.moe.norm_topk_prob) == (512, 10, True)
    assert (spec.rope.theta, spec.rope.rope_type, spec.dtype, spec.quant) == (1e7, "default", torch.bfloat16, None)
    assert spec.num_mtp_layers == 0, "the published config does not mention its MTP layer"
    assert spec.dense_layers == frozenset()


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Fields that both spellings share, right in every combination."""
    kv_heads, key_heads = draw(st.integers(1, 4)), draw(st.integers(1, 4))
    num_layers, experts = draw(st.integers(1, 9)), draw(st.integers(1, 16))
    return {
        "num_hidden_layers": num_layers,
        "hidden_size": draw(st.integers(1, 300)),
        "vocab_size": draw(st.integers(1, 300)),
        "num_key_value_heads": kv_heads,
        "num_attention_heads": kv_heads * draw(st.integers(1, 4)),
        "head_dim": 8 * draw(st.integers(1, 8)),
        "linear_num_key_heads": key_heads,
        "linear_num_value_heads": key_heads * draw(st.integers(1, 4)),
        "linear_conv_kernel_dim": draw(st.integers(2, 5)),
        "num_experts": experts,
        "num_experts_per_tok": draw(st.integers(1, experts)),
        "norm_topk_prob": draw(st.booleans()),
        "tie_word_embeddings": draw(st.booleans()),
        "rms_norm_eps": draw(st.sampled_from([1e-5, 1e-6])),
        "decoder_sparse_step": draw(st.integers(1, 3)),
        "mlp_only_layers": draw(st.lists(st.integers(0, num_layers - 1), unique=True)),
        "num_nextn_predict_layers": draw(st.sampled_from([0, 1])),
    }


@st.composite
def yarn(draw: st.DrawFn) -> dict[str, Any]:
    fields: dict[str, Any] = {"factor": draw(st.floats(1, 64)), "original_max_position_embeddings": 512}
    optional = {"attention_factor": 1.25, "beta_fast": 24, "beta_slow": 2.0, "truncate": False}
    return fields | {key: optional[key] for key in draw(st.sets(st.sampled_from(sorted(optional))))}


@given(shapes(), st.none() | yarn(), st.integers(1, 10), st.sampled_from(["bfloat16", "float16", "float32"]))
def test_both_spellings_give_the_same_spec(
    shape: dict[str, Any], scaling: dict[str, Any] | None, interval: int, dtype: str
) -> None:
    layers = range(shape["num_hidden_layers"])
    layer_types = ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in layers]
    typed = {"rope_type": "default"} if scaling is None else {"rope_type": "yarn", **scaling}
    old_scaling = None if scaling is None else {"type": "yarn", **scaling}
    old = old_form(**shape, full_attention_interval=interval, rope_scaling=old_scaling, torch_dtype=dtype)
    rope_parameters = typed | {"rope_theta": 10000000, "partial_rotary_factor": 0.25}
    new = new_form(**shape, layer_types=layer_types, rope_parameters=rope_parameters, dtype=f"torch.{dtype}")
    assert parse_config(old) == parse_config(new)
    assert hash(parse_config(old)) == hash(parse_config(new)), "tables are cached by spec"
    assert parse_config(old | {"layer_types": layer_types}) == parse_config(old)


@given(shapes(), st.integers(1, 5))
def test_agrees_with_what_transformers_writes(shape: dict[str, Any], interval: int) -> None:
    old = old_form(**shape, full_attention_interval=interval)
    written = Qwen3NextConfig(**old)
    assert parse_config(written) == parse_config(old)
    assert parse_config(json.loads(written.to_json_string())) == parse_config(old)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", BROKEN)
def test_broken_config_gets_one_sentence_with_field_and_remedy(name: str, form: str) -> None:
    config = FORMS[form]()
    parse_config(config)
    BROKEN[name].mutate(config)
    with pytest.raises(ConfigError) as caught:
        parse_config(config)
    message = str(caught.value)
    assert BROKEN[name].field in message
    assert BROKEN[name].remedy in message
    assert message.startswith("config.json: ") and message.endswith(".") and "\n" not in message
    assert len(message) < 300
    assert caught.value.field and caught.value.field in message


def test_there_are_enough_broken_configs_to_serve() -> None:
    assert len(set(SERVED)) >= 10 and set(SERVED) <= set(BROKEN)


@given(st.sampled_from(sorted(new_form())), st.none() | st.text() | st.floats() | st.integers() | st.lists(st.none()))
def test_any_value_in_any_field_is_read_or_refused_by_name(field: str, value: object) -> None:
    for form in FORMS.values():
        try:
            parse_config(form(**{field: value}))
        except ConfigError as error:
            assert "\n" not in str(error) and error.field


def test_errors_cross_process_borders() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config(old_form(head_dim=33))
    copy = pickle.loads(pickle.dumps(caught.value))
    assert (str(copy), copy.field) == (str(caught.value), "head_dim")


def test_drafter_names_of_both_engines_are_accepted() -> None:
    for names in ({"model_type": "qwen3_next_mtp", "architectures": ["Qwen3NextMTP"]}, {"architectures": None}):
        assert parse_config(old_form(**names)) == parse_config(old_form())
    assert parse_config(old_form(architectures=["Qwen3NextForCausalLMMTP"])) == parse_config(old_form())


def test_yarn_defaults_come_from_the_model() -> None:
    rope = parse_config(old_form(rope_scaling={"rope_type": "yarn", "original_max_position_embeddings": 256})).rope
    assert (rope.factor, rope.beta_fast, rope.beta_slow, rope.truncate) == (4.0, 32.0, 1.0, True)
    assert rope.attention_factor is None


def test_an_override_without_base_or_partial_factor_takes_them_from_the_top_level() -> None:
    scaling = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 512}
    config = old_form(rope_parameters=scaling)
    del config["rope_scaling"]
    assert (parse_config(config).rope.theta, parse_config(config).rope.partial_rotary_factor) == (1e7, 0.25)
    # transformers 5 keeps the base in the dict that the override replaces: then it is gone, and that is said.
    with pytest.raises(ConfigError, match="rope_theta is missing"):
        parse_config(new_form(rope_parameters=scaling))


def test_fp8_and_what_it_leaves_alone() -> None:
    ignored = ["lm_head", "model.layers.0.mlp.gate", "mlp.shared_expert_gate"]
    fp8 = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ignored,
    }
    quant = parse_config(new_form(quantization_config=fp8)).quant
    assert quant == QuantSpec("fp8", (128, 128), tuple(ignored), "dynamic")
    assert quant.is_ignored("lm_head") and quant.is_ignored("model.layers.0.mlp.gate")
    assert quant.is_ignored("model.layers.7.mlp.shared_expert_gate")
    assert not quant.is_ignored("model.layers.0.mlp.gate_proj") and not quant.is_ignored("model.layers.1.mlp.gate")


def test_load_spec_reads_a_directory_or_a_file_and_names_what_is_wrong(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    with pytest.raises(ConfigError, match="config.json: cannot be read"):
        load_spec(tmp_path)
    for text, match in (("{", "not valid JSON"), ("[1]", "a list"), ("\udcff", "not valid JSON")):
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
        with pytest.raises(ConfigError, match=match):
            load_spec(tmp_path)
    file.write_text(json.dumps(new_form()))
    assert load_spec(tmp_path) == load_spec(str(file)) == parse_config(new_form())
