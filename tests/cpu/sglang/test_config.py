"""config.json as SGLang reads it with this plugin: layers from either spelling, drafters, refusals; no server."""

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
from sglang.srt.configs.hybrid_arch import hybrid_gdn_config
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.configs.update_config import adjust_config_with_unaligned_cpu_tp
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.errors import ConfigError, WeightError
from qwen3next_plugin.sglang_integration.config import full_attention_interval
from qwen3next_plugin.sglang_integration.spec import spec_of
from tests.broken_configs import BROKEN
from tests.configs import new_form, old_form

LINEAR, FULL = "linear_attention", "full_attention"


def model_config(directory: Path, config: dict[str, Any], **options: Any) -> ModelConfig:
    (directory / "config.json").write_text(json.dumps(config))
    return ModelConfig(str(directory), **options)


@pytest.mark.parametrize(
    ("layer_types", "interval"),
    [([LINEAR] * 3 + [FULL], 4), ([LINEAR, FULL] * 2, 2), ([FULL] * 4, 1), ([LINEAR, FULL, FULL, LINEAR], None)],
)
def test_layer_types_alone_are_enough(tmp_path: Path, layer_types: list[str], interval: int | None) -> None:
    """transformers 5 writes no full_attention_interval, without which SGLang's own class cannot name its layers."""
    assert full_attention_interval(layer_types) == interval
    found = model_config(tmp_path, new_form(layer_types=layer_types)).hf_config
    linear = [i for i, kind in enumerate(layer_types) if kind == LINEAR]
    for config in (found, copy.deepcopy(found), pickle.loads(pickle.dumps(found))):
        assert config.linear_layer_ids == linear
        assert config.full_attention_layer_ids == [i for i in range(4) if i not in linear]
        assert getattr(config, "full_attention_interval", None) == interval


def test_an_interval_alone_is_enough(tmp_path: Path) -> None:
    found = model_config(tmp_path, old_form())
    assert found.hf_config.linear_layer_ids == [0, 1, 2] and found.hf_config.full_attention_layer_ids == [3]
    assert hybrid_gdn_config(found) is found.hf_config
    fewer = ModelConfig(str(tmp_path), model_override_args='{"num_hidden_layers": 2, "full_attention_interval": 2}')
    assert fewer.hf_config.linear_layer_ids == [0]


@pytest.mark.parametrize("form", [old_form, new_form])
def test_what_sglang_pads_for_several_ranks_on_a_cpu_is_as_in_the_checkpoint(tmp_path: Path, form: Any) -> None:
    config = form(moe_intermediate_size=48, shared_expert_intermediate_size=16)
    found = model_config(tmp_path, config)
    padded = adjust_config_with_unaligned_cpu_tp(found, LoadConfig(), 4).hf_config
    assert padded.moe_intermediate_size == padded.shared_expert_intermediate_size == 128
    assert padded.num_key_value_heads == 4 != config["num_key_value_heads"]
    assert spec_of(padded) == parse_config(config)


def test_the_published_config_says_nothing_of_its_mtp_layer(tmp_path: Path) -> None:
    config = old_form()
    assert "num_nextn_predict_layers" not in config
    found = model_config(tmp_path, config, is_draft_model=True)
    assert found.hf_config.architectures == ["Qwen3NextForCausalLMMTP"]
    assert found.hf_config.num_nextn_predict_layers == 1


@pytest.mark.parametrize("form", [old_form, new_form])
@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_config_is_refused(tmp_path: Path, kind: str, form: Any) -> None:
    config = form()
    try:
        BROKEN[kind].mutate(config)
    except KeyError:
        pytest.skip("the other spelling has this field")
    with pytest.raises(ConfigError) as caught:
        model_config(tmp_path, config)
    assert BROKEN[kind].field in str(caught.value) and BROKEN[kind].remedy in str(caught.value)


def test_an_override_is_checked_as_config_json_is(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(old_form()))
    arguments = ServerArgs(model_path=str(tmp_path), device="cpu", json_model_override_args='{"num_experts": 1}')
    with pytest.raises(ConfigError, match=r"num_experts_per_tok is 2: give at most num_experts \(1\)"):
        ModelConfig.from_server_args(arguments)


def test_files_and_ranks_are_checked_before_anything_is_loaded(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    ModelConfig.from_server_args(ServerArgs(model_path=str(checkpoint), device="cpu"))
    with pytest.raises(WeightError, match="3"):
        ModelConfig.from_server_args(ServerArgs(model_path=str(checkpoint), device="cpu", tp_size=3))
    weights = checkpoint / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    from qwen3next_plugin.sglang_integration import checks

    checks._check_files.cache_clear()
    with pytest.raises(WeightError, match="model.safetensors"):
        ModelConfig.from_server_args(ServerArgs(model_path=str(checkpoint), device="cpu"))


def test_other_models_are_left_alone(tmp_path: Path) -> None:
    other = {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "max_position_embeddings": 77}
    found = model_config(tmp_path, other)
    assert found.context_len == 77 and type(found.hf_config).__module__.startswith("transformers.")
