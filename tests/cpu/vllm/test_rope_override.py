"""YaRN asked of vLLM in each of its ways: what model, drafter and context length become; no server."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig
from vllm.engine.arg_utils import EngineArgs

from qwen3next_plugin import vllm_integration
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.errors import ConfigError, SettingsError
from qwen3next_plugin.rope import build_cos_sin
from qwen3next_plugin.vllm_integration.spec import cos_sin_table, spec_of
from tests.wrong_ropes import COMPLETED, assert_refused

TRAINED = 256
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": TRAINED}
WHOLE = YARN | COMPLETED


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("rope") / "tiny"
    return write_random_checkpoint(
        directory, "tiny", dtype="float32", max_position_embeddings=TRAINED, num_nextn_predict_layers=1
    )


@pytest.fixture(autouse=True)
def engine_like_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN3NEXT_ROPE", "VLLM_ALLOW_LONG_MAX_MODEL_LEN"):
        monkeypatch.delenv(name, raising=False)
    vllm_integration.register()


def engine_config(checkpoint: Path, overrides: Any = None, **options: Any) -> VllmConfig:
    """What `vllm serve` makes of these flags before it starts anything."""
    overrides = {} if overrides is None else overrides
    return EngineArgs(
        model=str(checkpoint), hf_overrides=overrides, dtype="float32", enforce_eager=True, **options
    ).create_engine_config()


@pytest.mark.parametrize(
    ("overrides", "shortcut"),
    [
        ({"rope_scaling": YARN}, ""),
        ({"rope_parameters": YARN}, ""),
        ({"rope_parameters": YARN, "max_position_embeddings": 4 * TRAINED}, ""),
        ({}, "yarn:4"),
        ({}, f"yarn:4:{TRAINED}"),
        ({"rope_scaling": YARN}, "yarn:4"),
    ],
)
def test_model_drafter_and_length_agree(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], shortcut: str
) -> None:
    monkeypatch.setenv("QWEN3NEXT_ROPE", shortcut)
    config = engine_config(checkpoint, overrides, speculative_config={"method": "mtp", "num_speculative_tokens": 1})
    draft = config.speculative_config.draft_model_config
    for model_config in (config.model_config, draft):
        assert model_config.max_model_len == model_config.hf_config.max_position_embeddings == 4 * TRAINED
        assert model_config.hf_config.rope_parameters == WHOLE
    spec = spec_of(config)
    assert spec.rope == parse_config(draft.hf_config).rope
    assert spec.attention.rotary_dim == 16
    table = cos_sin_table(spec, config)
    assert table.dtype is torch.float32
    assert torch.equal(table, build_cos_sin(spec.rope, 16, 4 * TRAINED))


def test_a_config_json_with_yarn_in_it(checkpoint: Path, tmp_path: Path) -> None:
    """As the model's card tells users to edit it."""
    config = json.loads((checkpoint / "config.json").read_text()) | {"rope_scaling": YARN}
    for name in ("tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        (tmp_path / name).symlink_to(checkpoint / name)
    (tmp_path / "config.json").write_text(json.dumps(config))
    found = engine_config(tmp_path).model_config
    assert found.hf_config.rope_parameters == WHOLE and found.max_model_len == 4 * TRAINED


def test_without_yarn_nothing_changes(checkpoint: Path) -> None:
    plain = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
    for overrides in ({}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}):
        found = engine_config(checkpoint, overrides).model_config
        assert found.hf_config.rope_parameters == plain and found.max_model_len == TRAINED


def test_a_program_that_changes_the_config(checkpoint: Path) -> None:
    def extend(hf_config: Any) -> Any:
        hf_config.rope_parameters = dict(YARN)
        return hf_config

    found = engine_config(checkpoint, extend).model_config
    assert found.hf_config.rope_parameters == WHOLE and found.max_model_len == 4 * TRAINED


def test_a_shorter_context_may_be_asked_for(checkpoint: Path) -> None:
    found = engine_config(checkpoint, {"rope_scaling": YARN}, max_model_len=700).model_config
    assert found.max_model_len == 700 and found.hf_config.max_position_embeddings == 4 * TRAINED
    found = engine_config(checkpoint, {"rope_scaling": YARN, "max_position_embeddings": 600}).model_config
    assert found.max_model_len == 600


@pytest.mark.parametrize(
    ("overrides", "options", "parts"),
    [
        ({"rope_scaling": YARN}, {"max_model_len": 1025}, ("--max-model-len is 1025", "covers 1024", '"factor": 5.0')),
        ({}, {"max_model_len": 1000}, ("--max-model-len is 1000", "without YaRN covers 256", '"factor": 4.0')),
        ({"rope_scaling": YARN, "max_position_embeddings": 2048}, {}, ("is 2048", "covers 1024", '"factor": 8.0')),
        ({"rope_scaling": YARN | {"rope_theta": 10000.0}}, {}, ("rope_theta is 10000", '"rope_theta": 10000000.0')),
        ({"rope_scaling": YARN | {"attn_factor": 1.0}}, {}, ("attn_factor", '"attention_factor": 1.1386')),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, {}, ("rope_scaling", "give one")),
        ({"rope_scaling": "yarn"}, {}, ("rope_scaling is 'yarn'", "give a dict")),
    ],
)
def test_what_cannot_be_is_refused(
    checkpoint: Path, overrides: dict[str, Any], options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    assert_refused(lambda: engine_config(checkpoint, overrides, **options), parts)


def test_the_shortcut_is_checked_too(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3NEXT_ROPE", "yarn:2")
    with pytest.raises(ConfigError, match="factor is 4 while QWEN3NEXT_ROPE says 2"):
        engine_config(checkpoint, {"rope_scaling": YARN})
    monkeypatch.setenv("QWEN3NEXT_ROPE", "yarn")
    with pytest.raises(SettingsError, match="QWEN3NEXT_ROPE is 'yarn'"):
        engine_config(checkpoint)


def test_vllms_own_switch_lets_longer_requests_pass(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_ALLOW_LONG_MAX_MODEL_LEN", "1")
    config = engine_config(checkpoint, max_model_len=1000)
    assert config.model_config.max_model_len == 1000
    assert cos_sin_table(spec_of(config), config).shape[0] == 1000
