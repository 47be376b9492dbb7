"""Exporting to an engine, with one made of folders: the real ones are in tests/cpu/vllm and tests/cpu/sglang."""

import json
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen3next_plugin import cli
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.moe.config import CONFIGS, MoeConfig, Tile
from qwen3next_plugin.tune import export as exporting
from qwen3next_plugin.tune.export import engine_config, export
from qwen3next_plugin.tune.problem import Problem

FP8 = Problem(512, 512, 10, 2048, 512, "fp8")
NAME = "E=512,N=512,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[128,128].json"


@pytest.fixture
def shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Each engine's own config folder."""

    def find(engine: str) -> ModuleSpec:
        spec = ModuleSpec(engine, None, is_package=True)
        spec.submodule_search_locations = [str(tmp_path / "site" / engine)]
        return spec

    for engine, folder in exporting._SHIPPED.items():
        (tmp_path / "site" / engine / folder).mkdir(parents=True)
    monkeypatch.setattr(exporting, "find_spec", find)
    return tmp_path / "site"


def test_our_tiles_in_their_fields() -> None:
    config = MoeConfig(64, Tile(64, 64, 4, 4), Tile(128, 128, 8, 3))
    first, second = engine_config(config, None, False), engine_config(config, None, True)
    assert first == {
        "BLOCK_SIZE_M": 64, "BLOCK_SIZE_N": 128, "BLOCK_SIZE_K": 64, "GROUP_SIZE_M": 16, "num_warps": 4, "num_stages": 4
    }  # fmt: skip
    assert (second["BLOCK_SIZE_N"], second["BLOCK_SIZE_K"], second["num_warps"]) == (128, 128, 8)
    deeper = engine_config(config, 128, False)
    assert (deeper["BLOCK_SIZE_K"], deeper["num_stages"]) == (128, 2), "as much shared memory as before"
    assert engine_config(MoeConfig(16, Tile(256, 64, 4, 2), Tile(32, 64, 4, 2)), None, False)["BLOCK_SIZE_N"] == 256


@pytest.mark.usefixtures("shipped")
def test_a_users_files_come_before_ours(tmp_path: Path) -> None:
    own = tmp_path / "own" / "b200" / FP8.file_name
    own.parent.mkdir(parents=True)
    text = (CONFIGS / "b200" / FP8.file_name).read_text()
    own.write_text(text.replace('"source": "model"', '"source": "measured"'))
    export("vllm", tmp_path / "out", FP8, "NVIDIA B200", (tmp_path / "own", CONFIGS))
    assert json.loads((tmp_path / "out" / "qwen3next.json").read_text())[NAME]["source"] == "measured"


def test_a_shipped_name_is_left_out_even_when_it_was_written_before(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert export("vllm", out, FP8, "NVIDIA B200", (CONFIGS,)).written == (out / NAME,)
    (shipped / "vllm" / exporting._SHIPPED["vllm"] / NAME).write_text("{}")
    done = export("vllm", out, FP8, "NVIDIA B200", (CONFIGS,))
    assert not done.written and done.shipped == (NAME,) and not (out / NAME).exists()


@pytest.mark.usefixtures("shipped")
def test_a_file_of_somebody_elses_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / NAME).write_text("theirs")
    with pytest.raises(PluginError, match="is there and not from here"):
        export("vllm", tmp_path, FP8, "NVIDIA B200", (CONFIGS,))
    assert (tmp_path / NAME).read_text() == "theirs"


@pytest.mark.usefixtures("shipped")
def test_what_cannot_be_exported_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    odd = Problem(96, 96, 10, 2048, 512, "fp8")
    wrong = (
        ("trt", FP8, "NVIDIA B200", tmp_path, "'trt' is not known: use vllm or sglang"),
        ("vllm", odd, "NVIDIA B200", tmp_path, "There is no config for NVIDIA B200 and E=96"),
        ("vllm", FP8, "NVIDIA B300", tmp_path, "There is no config for NVIDIA B300"),
        ("vllm", FP8, "NVIDIA B200", tmp_path / "file" / "x", "cannot be written"),
        ("sglang", FP8, "NVIDIA B200", tmp_path / "file" / "x", "cannot be written"),
    )
    for engine, problem, device, target, words in wrong:
        with pytest.raises(PluginError, match=words) as caught:
            export(engine, target, problem, device, (CONFIGS,))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(exporting, "find_spec", lambda engine: None)
    with pytest.raises(PluginError, match="run this in the environment that has sglang"):
        export("sglang", tmp_path, FP8, "NVIDIA B200", (CONFIGS,))


@pytest.mark.usefixtures("shipped")
def test_the_command_says_how_to_start_the_engine(tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = CliRunner().invoke(cli.app, ["tune", "export", "vllm", str(out), "--gpu", "NVIDIA B200", "--tp", "8"])
    name = "E=512,N=64,device_name=NVIDIA_B200,dtype=fp8_w8a8,block_shape=[64,64].json"
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [str(out / name), f"Serve with them: VLLM_TUNED_CONFIG_FOLDER={out}"]
