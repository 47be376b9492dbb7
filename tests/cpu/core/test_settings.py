"""Switches from the environment."""

import pytest

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.settings import Settings, read_settings, settings_help


def test_defaults_and_every_value() -> None:
    assert read_settings({}) == Settings(enabled=True, kernels="auto")
    assert read_settings({"QWEN3NEXT_PLUGIN": "1", "PATH": "/bin"}) == Settings()
    assert read_settings({"QWEN3NEXT_PLUGIN": "", "QWEN3NEXT_KERNELS": ""}) == Settings()
    for kernels, backend in (("auto", None), ("triton", "triton"), ("reference", "reference")):
        found = read_settings({"QWEN3NEXT_KERNELS": kernels})
        assert (found.enabled, found.kernels, found.backend) == (True, kernels, backend)


def test_reads_the_process_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    assert read_settings().kernels == "reference"


def test_the_kill_switch_wins_over_everything() -> None:
    assert not read_settings({"QWEN3NEXT_PLUGIN": "0", "QWEN3NEXT_TYPO": "1", "QWEN3NEXT_KERNELS": "no"}).enabled


@pytest.mark.parametrize(
    ("environment", "parts"),
    [
        ({"QWEN3NEXT_PLUGIN": "off"}, ("QWEN3NEXT_PLUGIN is 'off'", "one of 1, 0")),
        ({"QWEN3NEXT_KERNELS": "cuda"}, ("QWEN3NEXT_KERNELS is 'cuda'", "auto, triton, reference")),
        ({"QWEN3NEXT_KERNEL": "triton"}, ("QWEN3NEXT_KERNEL is not a setting", "QWEN3NEXT_PLUGIN, QWEN3NEXT_KERNELS")),
    ],
)
def test_what_means_nothing_is_refused_with_what_would(environment: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(environment)
    message = str(caught.value)
    assert all(part in message for part in parts) and message.endswith(".") and "\n" not in message


def test_help_names_every_variable() -> None:
    lines = settings_help().splitlines()
    assert [line.split("=")[0] for line in lines] == ["QWEN3NEXT_PLUGIN", "QWEN3NEXT_KERNELS"]
