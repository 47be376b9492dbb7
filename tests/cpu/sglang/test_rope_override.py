"""YaRN asked of SGLang in each of its ways: what model, drafter and context length become; no server."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.rope import build_cos_sin
from qwen3next_plugin.sglang_integration import spec as model_spec
from qwen3next_plugin.sglang_integration.spec import cos_sin_table, spec_of
from tests.configs import new_form, old_form
from tests.wrong_ropes import COMPLETED, MILLION, TRAINED, WRONG, YARN, assert_refused, printed_dict

WHOLE = YARN | COMPLETED
PLAIN = {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25}
FORMS = {
    "published": config_of("80b"),
    "old": old_form(max_position_embeddings=TRAINED),
    "new": new_form(max_position_embeddings=TRAINED),
}


@pytest.fixture(autouse=True)
def no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN3NEXT_ROPE", "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "SGLANG_IS_IN_CI", "CI"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def checkpoint(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A directory that holds a config.json alone: nothing else is asked for before the rope is decided."""
    (tmp_path / "config.json").write_text(json.dumps(FORMS[getattr(request, "param", "published")]))
    return tmp_path


def model_config(checkpoint: Path, overrides: Any = None, **options: Any) -> ModelConfig:
    """What SGLang makes of --json-model-override-args and other flags."""
    return ModelConfig(str(checkpoint), model_override_args=json.dumps(overrides or {}), **options)


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
@pytest.mark.parametrize(
    ("overrides", "shortcut"),
    [
        ({"rope_scaling": YARN}, ""),
        ({"rope_parameters": YARN}, ""),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, ""),
        ({"rope_parameters": YARN, "rope_scaling": YARN}, ""),
        ({"rope_parameters": YARN, "max_position_embeddings": MILLION, "rope_theta": 10000000}, ""),
        ({}, "yarn:4"),
        ({}, f"yarn:4:{TRAINED}"),
        ({"rope_scaling": YARN}, "yarn:4"),
    ],
)
def test_model_drafter_and_length_agree(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, overrides: dict[str, Any], shortcut: str
) -> None:
    monkeypatch.setenv("QWEN3NEXT_ROPE", shortcut)
    model, drafter = model_config(checkpoint, overrides), model_config(checkpoint, overrides, is_draft_model=True)
    assert drafter.hf_config.architectures == ["Qwen3NextForCausalLMMTP"]
    for found in (model, drafter):
        assert found.context_len == found.hf_config.max_position_embeddings == MILLION
        assert found.hf_config.rope_parameters == WHOLE and found.hf_config.rope_theta == 1e7
    assert spec_of(model.hf_config).rope == spec_of(drafter.hf_config).rope


def test_the_table_is_the_decided_rope_in_float32(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Flags:
        context_length = None
        speculative_num_steps = None
        speculative_num_draft_tokens = None

    monkeypatch.setattr(model_spec, "get_model", Flags)
    monkeypatch.setattr(model_spec, "get_spec", Flags)
    spec = spec_of(model_config(checkpoint, {"rope_scaling": YARN}).hf_config)
    table = cos_sin_table(spec)
    assert table.dtype is torch.float32 and table.shape == (MILLION, 64)
    rows = [0, TRAINED - 1, TRAINED, 1_000_000]
    assert torch.equal(table[rows], build_cos_sin(spec.rope, 64, 1_000_001)[rows])


@pytest.mark.parametrize("checkpoint", FORMS, indirect=True)
@pytest.mark.parametrize("overrides", [{}, {"rope_scaling": None}, {"rope_parameters": {"rope_type": "default"}}])
def test_without_yarn_nothing_changes(checkpoint: Path, overrides: dict[str, Any]) -> None:
    found = model_config(checkpoint, overrides)
    assert found.hf_config.rope_parameters == PLAIN and found.context_len == TRAINED


def test_a_config_json_with_yarn_in_it(checkpoint: Path) -> None:
    """As the model's card tells users to edit it."""
    (checkpoint / "config.json").write_text(json.dumps(FORMS["published"] | {"rope_scaling": YARN}))
    found = model_config(checkpoint)
    assert found.hf_config.rope_parameters == WHOLE and found.context_len == MILLION
    assert model_config(checkpoint, {"rope_parameters": {"rope_type": "default"}}).context_len == TRAINED


def test_a_shorter_context_may_be_asked_for(checkpoint: Path) -> None:
    found = model_config(checkpoint, {"rope_scaling": YARN}, context_length=700_000)
    assert found.context_len == 700_000 and found.hf_config.max_position_embeddings == MILLION
    assert model_config(checkpoint, {"rope_scaling": YARN, "max_position_embeddings": 600_000}).context_len == 600_000


@pytest.mark.parametrize("spelling", ["rope_scaling", "rope_parameters"])
@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_request_is_refused_with_the_right_dict(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch, name: str, spelling: str
) -> None:
    asked, parts, factor = WRONG[name]
    overrides = {spelling: asked.get("asked"), "max_position_embeddings": asked.get("asked_length", TRAINED)}
    if "shortcut" in asked:
        original = asked["shortcut"].original
        suffix = f":{original}" if original else ""
        monkeypatch.setenv("QWEN3NEXT_ROPE", f"yarn:{asked['shortcut'].factor:g}{suffix}")
    with pytest.raises(ConfigError) as caught:
        model_config(checkpoint, overrides)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    right = printed_dict(message)
    monkeypatch.delenv("QWEN3NEXT_ROPE", raising=False)
    found = model_config(checkpoint, {"rope_parameters": right})
    assert found.hf_config.rope_parameters == right and right["factor"] == factor
    assert found.context_len >= asked.get("asked_length", 0)


@pytest.mark.parametrize(
    ("overrides", "options", "parts"),
    [
        (
            {"rope_scaling": YARN},
            {"context_length": MILLION + 1},
            ("--context-length is 1048577", "covers 1048576", '"factor": 5.0'),
        ),
        ({}, {"context_length": MILLION}, ("--context-length is 1048576", "without YaRN", '"factor": 4.0')),
        ({"rope_scaling": YARN, "rope_parameters": YARN | {"factor": 2.0}}, {}, ("rope_scaling", "give one")),
        ({"rope_scaling": "yarn"}, {}, ("rope_scaling is 'yarn'", "give a dict")),
        ({"rope_theta": 10000}, {}, ("rope_theta is 10000", '"rope_theta": 10000000.0')),
        ({"rope_scaling": YARN, "partial_rotary_factor": 1.0}, {}, ("partial_rotary_factor is 1", "0.25")),
    ],
)
def test_what_sglangs_own_flags_contradict_is_refused(
    checkpoint: Path, overrides: dict[str, Any], options: dict[str, Any], parts: tuple[str, ...]
) -> None:
    assert_refused(lambda: model_config(checkpoint, overrides, **options), parts)


def test_sglangs_own_switch_lets_longer_requests_pass(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "1")
    assert model_config(checkpoint, context_length=MILLION).context_len == MILLION
    card = model_config(checkpoint, {"rope_scaling": YARN}, context_length=1_010_000)  # as the model's card starts it
    assert card.context_len == 1_010_000 and card.hf_config.max_position_embeddings == MILLION


def test_tokenizer_workers_load_no_plugins(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(overrides: dict[str, Any]) -> ModelConfig:
        text = json.dumps(overrides)
        options = {"device": "cpu", "tokenizer_worker_num": 2, "load_format": "dummy"}
        return ModelConfig.from_server_args(
            ServerArgs(model_path=str(checkpoint), json_model_override_args=text, **options)
        )

    assert start({}).context_len == TRAINED
    for overrides in ({"rope_scaling": YARN}, {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}):
        with pytest.raises(ConfigError, match="use --tokenizer-worker-num 1 or") as caught:
            start(overrides)
    right = json.loads(str(caught.value).split("'")[1])
    assert start(right).context_len == MILLION
    unhooked = unhooked_model_config(checkpoint, right)
    assert unhooked.context_len == MILLION and unhooked.hf_config.rope_parameters["rope_type"] == "yarn"


def unhooked_model_config(checkpoint: Path, overrides: dict[str, Any]) -> ModelConfig:
    """As a process without plugins makes it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelConfig, "_derive_context_length", ModelConfig._derive_context_length.__wrapped__)
        return model_config(checkpoint, overrides)
