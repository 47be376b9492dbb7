"""What hangs in SGLang once its plugins are loaded, and what happens when something does not."""

import json
import logging
import pkgutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import sglang
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.plugins.hook_registry import HookRegistry, HookType
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin import sglang_integration
from qwen3next_plugin.errors import RegistrationError
from qwen3next_plugin.refusal import EXIT_CODE
from qwen3next_plugin.settings import read_settings
from qwen3next_plugin.sglang_integration import registration
from tests.configs import old_form

ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3NextForCausalLMMTP")
TARGETS = registration.TARGETS
# Without its own of these a class has its parent's, which is a target too.
OWN_TARGETS = [target for target in TARGETS if ".Unified" not in target]


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("QWEN3NEXT_PLUGIN", "QWEN3NEXT_ROPE"):
        monkeypatch.delenv(name, raising=False)


def refusal_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The sentence with which the entry point ends a process."""
    with pytest.raises(SystemExit) as ended:
        sglang_integration.register()
    assert ended.value.code == EXIT_CODE
    lines = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in lines if line.startswith("qwen3next-plugin: ")]
    assert sentence.endswith(".")
    return sentence


def test_our_classes_and_hooks_are_in_force_and_stay_so() -> None:
    registration.verify()
    registration.activate(read_settings({}))
    registration.verify()
    for architecture in ARCHITECTURES:
        model, name = ModelRegistry.resolve_model_cls([architecture])
        assert name == architecture and model.__module__.startswith(f"{sglang_integration.__name__}.")
    assert all(len(HookRegistry._hooks[target]) == 1 for target in TARGETS)


def test_other_modules_see_the_hooks_too() -> None:
    from sglang.srt.model_loader import loader, utils

    assert loader.get_model_architecture is utils.get_model_architecture


@pytest.mark.parametrize("target", OWN_TARGETS)
def test_a_renamed_target_is_refused(
    target: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    owner, _, name = target.rpartition(".")
    monkeypatch.delattr(pkgutil.resolve_name(owner), name)
    sentence = refusal_of(capsys)
    assert f"{target} is gone in sglang {sglang.__version__}" in sentence and "QWEN3NEXT_PLUGIN=0" in sentence


@pytest.mark.parametrize("target", TARGETS)
def test_a_hook_that_is_not_in_force_is_refused(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    owner, _, name = target.rpartition(".")
    hooked = pkgutil.resolve_name(target)
    monkeypatch.setattr(pkgutil.resolve_name(owner), name, hooked.__wrapped__)
    with pytest.raises(RegistrationError, match=f"the hook on {target} is not in force"):
        registration.verify()


def test_sglang_ends_where_another_plugin_took_our_place(capsys: pytest.CaptureFixture[str]) -> None:
    """SGLang itself logs a warning about two plugins and starts with the later one."""
    (target, *_) = TARGETS
    owner, _, name = target.rpartition(".")
    ours, hooks = pkgutil.resolve_name(target), list(HookRegistry._hooks[target])
    try:
        HookRegistry.register(target, lambda runner: None, HookType.REPLACE)
        HookRegistry._patched.discard(target)
        with pytest.raises(SystemExit):
            HookRegistry.apply_hooks()
    finally:
        HookRegistry._hooks[target][:] = hooks
        setattr(pkgutil.resolve_name(owner), name, ours)
    registration.verify()
    assert f"the hook on {target} is not in force" in capsys.readouterr().err


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_another_plugins_model_is_refused(architecture: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ModelRegistry.models, architecture, object)
    with pytest.raises(RegistrationError, match=f"{architecture} is <class 'object'> in SGLang's registry"):
        registration.verify()


def test_a_model_that_is_not_ours_is_not_built(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever leads there: a registry changed later on, or --model-impl."""
    from sglang.srt.model_loader.utils import get_model_architecture
    from sglang.srt.models import qwen3_next

    def config(model_type: str) -> Any:
        hf_config = SimpleNamespace(model_type=model_type, architectures=["Qwen3NextForCausalLM"])
        return SimpleNamespace(hf_config=hf_config, quantization=None, model_impl="auto")

    model, _ = get_model_architecture(config("qwen3_next"))
    assert model.__module__.startswith(sglang_integration.__name__)
    monkeypatch.setitem(ModelRegistry.models, "Qwen3NextForCausalLM", qwen3_next.Qwen3NextForCausalLM)
    with pytest.raises(RegistrationError, match="would serve sglang.srt.models.qwen3_next.Qwen3NextForCausalLM"):
        get_model_architecture(config("qwen3_next"))
    assert get_model_architecture(config("qwen2"))[0] is qwen3_next.Qwen3NextForCausalLM


def test_another_implementation_is_refused_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(old_form()))
    arguments = ServerArgs(model_path=str(tmp_path), device="cpu", model_impl="transformers")
    with pytest.raises(RegistrationError, match="would serve its --model-impl transformers in place of"):
        ModelConfig.from_server_args(arguments)


def test_an_unsupported_version_is_refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sglang, "__version__", "0.6.0")
    sentence = refusal_of(capsys)
    assert "sglang 0.6.0 is not supported" in sentence and ">=0.5.20,<0.5.24" in sentence


def test_whatever_registering_raises_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(settings: object) -> None:
        raise KeyError("an accident")

    monkeypatch.setattr(registration, "activate", broken)
    sentence = refusal_of(capsys)
    assert "registering with SGLang failed (KeyError: 'an accident')" in sentence and "QWEN3NEXT_PLUGIN=0" in sentence


def test_a_setting_that_means_nothing_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("QWEN3NEXT_ROPE", "yarn")
    assert "QWEN3NEXT_ROPE is 'yarn'" in refusal_of(capsys)


def test_switched_off_it_says_that_the_server_is_stock(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("QWEN3NEXT_PLUGIN", "0")
    monkeypatch.setattr(registration, "activate", None)
    with caplog.at_level(logging.INFO):
        sglang_integration.register()
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and "this server is stock SGLang" in record.getMessage()
