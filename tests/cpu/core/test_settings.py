"""Switches from the environment."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels import dispatch, offers
from qwen3next_plugin.kernels.gdn import config as gdn_config
from qwen3next_plugin.kernels.gdn import peers
from qwen3next_plugin.kernels.moe import config
from qwen3next_plugin.kernels.moe import peers as moe_peers
from qwen3next_plugin.rope_request import RopeShortcut
from qwen3next_plugin.settings import Settings, read_settings, settings_help

WRONG_SHORTCUTS = ("4", "yarn", "yarn:", "yarn:0.5", "yarn:-4", "yarn:1e3", "yarn:4:", "yarn:4:0", "linear:4", "YARN:4")


def test_defaults_and_every_value() -> None:
    assert read_settings({}) == Settings(enabled=True, kernels="auto")
    assert read_settings({"QWEN3NEXT_PLUGIN": "1", "PATH": "/bin"}) == Settings()
    assert read_settings({"QWEN3NEXT_PLUGIN": "", "QWEN3NEXT_KERNELS": ""}) == Settings()
    for kernels, backend in (("auto", None), ("triton", "triton"), ("reference", "reference")):
        found = read_settings({"QWEN3NEXT_KERNELS": kernels})
        assert (found.enabled, found.kernels, found.backend) == (True, kernels, backend)
    assert read_settings({}).warm_up and not read_settings({"QWEN3NEXT_WARMUP": "0"}).warm_up
    assert read_settings({"QWEN3NEXT_ROPE": "yarn:4"}).rope == RopeShortcut(4.0)
    assert read_settings({"QWEN3NEXT_ROPE": "yarn:2.5:262144"}).rope == RopeShortcut(2.5, 262144)


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
        *(({"QWEN3NEXT_ROPE": text}, (f"QWEN3NEXT_ROPE is {text!r}", "yarn:4")) for text in WRONG_SHORTCUTS),
    ],
)
def test_what_means_nothing_is_refused_with_what_would(environment: dict[str, str], parts: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError) as caught:
        read_settings(environment)
    message = str(caught.value)
    assert all(part in message for part in parts) and message.endswith(".") and "\n" not in message


def test_triton_on_a_cpu_needs_its_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings(kernels="triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    settings.check_device("cpu")
    monkeypatch.delenv("TRITON_INTERPRET")
    settings.check_device("cuda")
    Settings().check_device("cpu")
    with pytest.raises(SettingsError, match="QWEN3NEXT_KERNELS is 'triton' on a CPU"):
        settings.check_device("cpu")


@pytest.mark.parametrize(
    ("name", "values"), [("QWEN3NEXT_GDN_PREFILL", ("fla", "flashinfer")), ("QWEN3NEXT_MOE_PREFILL", ("deepgemm",))]
)
def test_prefill_by_an_engine_needs_a_gpu_and_its_kernels(name: str, values: tuple[str, ...]) -> None:
    for value in values:
        settings = read_settings({name: value})
        settings.check_device("cuda")
        with pytest.raises(SettingsError, match=f"{name} is '{value}' on a CPU: use auto or own"):
            settings.check_device("cpu")
        with pytest.raises(SettingsError, match=f"{name} is '{value}' beside QWEN3NEXT_KERNELS=reference: use auto or"):
            replace(settings, kernels="reference").check_device("cuda")
    read_settings({name: "own"}).check_device("cpu")
    with pytest.raises(SettingsError, match=f"{name} is 'cuda': use one of auto, own, {', '.join(values)}"):
        read_settings({name: "cuda"})


def test_the_kernels_are_told_who_prefills() -> None:
    try:
        Settings(gdn_prefill="own", moe_prefill="deepgemm").tell_kernels()
        assert (peers.OFFERS.wanted, moe_peers.OFFERS.wanted) == (offers.OWN, "deepgemm")
    finally:
        Settings().tell_kernels()
    assert peers.OFFERS.wanted == moe_peers.OFFERS.wanted == offers.AUTO


def test_the_switch_reaches_every_operation(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    x = torch.zeros(1)
    try:
        assert dispatch.choose(x, Settings().backend) == "reference"
        dispatch.prefer(Settings(kernels="triton").backend)
        assert dispatch.choose(x, None) == "triton" and dispatch.choose(x, "reference") == "reference"
        assert dispatch.describe("cpu")["gdn_decode"].startswith("triton")
        dispatch.prefer(Settings(kernels="reference").backend)
        assert set(dispatch.describe("cuda").values()) == {"reference"}
        with pytest.raises(ValueError, match="backend is 'cuda'"):
            dispatch.prefer("cuda")
    finally:
        dispatch.prefer(None)


def test_the_kernels_are_told_once_for_all(tmp_path: Path) -> None:
    folders = {"QWEN3NEXT_MOE_CONFIGS": str(tmp_path), "QWEN3NEXT_GDN_CONFIGS": str(tmp_path)}
    wanted = read_settings({"QWEN3NEXT_KERNELS": "reference", **folders})
    try:
        wanted.tell_kernels()
        assert set(dispatch.describe("cuda").values()) == {"reference"}
        assert config._folders() == (tmp_path, config.CONFIGS)
        assert gdn_config._folders() == (tmp_path, gdn_config.CONFIGS)
        with pytest.raises(SettingsError, match="QWEN3NEXT_MOE_CONFIGS: .*nowhere is not a folder: give the one that"):
            Settings(moe_configs=tmp_path / "nowhere").tell_kernels()
        (tmp_path / "h200").mkdir()
        (tmp_path / "h200" / "gdn.json").write_text("{}")
        with pytest.raises(SettingsError, match=r"QWEN3NEXT_GDN_CONFIGS: .*gdn\.json is not a table of .*\.$"):
            Settings(gdn_configs=tmp_path).tell_kernels()
    finally:
        Settings().tell_kernels()
    assert config._folders() == (config.CONFIGS,) and gdn_config._folders() == (gdn_config.CONFIGS,)


def test_help_names_every_variable() -> None:
    lines = settings_help().splitlines()
    names = [
        f"QWEN3NEXT_{name}"
        for name in (
            *("PLUGIN", "KERNELS", "GDN_PREFILL", "MOE_PREFILL", "PREFILL_GRAPHS"),
            *("GDN_CONFIGS", "ROPE", "MOE_CONFIGS"),
            *("WARMUP", "RECORD", "RECORD_EXPERTS"),
        )
    ]
    assert [line.split("=")[0] for line in lines] == names
