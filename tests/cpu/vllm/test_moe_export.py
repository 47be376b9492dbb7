"""Files exported for vLLM's own fused MoE kernel: vLLM asks for these names, reads these fields and keeps its own."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from vllm.model_executor.layers.fused_moe import fused_moe
from vllm.platforms import current_platform

from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import CONFIGS, file_name, read_file
from qwen3next_plugin.tune.export import export, shipped_folder, vllm_name
from qwen3next_plugin.tune.problem import Problem

FP8, BF16 = Problem(512, 512, 10, 2048, 512, "fp8"), Problem(512, 512, 10, 2048, 512, "bf16")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> Iterator[None]:
    fused_moe.get_moe_configs.cache_clear()
    yield
    fused_moe.get_moe_configs.cache_clear()
    fused_moe.get_device_name_as_file_name.cache_clear()


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM takes the machine for one with this GPU."""
    monkeypatch.setattr(current_platform, "get_device_name", lambda device_id=0: device)
    fused_moe.get_device_name_as_file_name.cache_clear()


@pytest.mark.parametrize("device", [gpu.name for gpu in KNOWN.values()] + ["NVIDIA H200 NVL", "NVIDIA H20-3e", "A / B"])
@pytest.mark.parametrize("mode", ["bf16", "fp8"])
@pytest.mark.parametrize(("inner", "block"), [(512, 128), (64, 64)])
def test_names_are_vllms(device: str, mode: str, inner: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    dtype, shape = ("fp8_w8a8", [block, block]) if mode == "fp8" else (None, None)
    assert vllm_name(512, inner, device, mode, block) == fused_moe.get_config_file_name(512, inner, dtype, shape)


def test_vllm_reads_what_was_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on("NVIDIA H200", monkeypatch)
    assert fused_moe.get_moe_configs(512, 512, "fp8_w8a8", 128, 128) is None, "vLLM ships none"
    fused_moe.get_moe_configs.cache_clear()
    done = export("vllm", tmp_path, FP8, "NVIDIA H200", (CONFIGS,))
    assert [path.parent for path in done.written] == [tmp_path] and not done.shipped
    variable, _, folder = done.variable.partition("=")
    monkeypatch.setenv(variable, folder)
    found = fused_moe.get_moe_configs(512, 512, "fp8_w8a8", 128, 128)
    held = read_file(CONFIGS / "h200" / file_name(512, 2048, 512, "float8_e4m3fn"))
    assert found is not None and sorted(found) == sorted({entry.tokens for entry in held.entries})
    default = fused_moe.get_default_config(64, 512, 512, 2048, 10, "fp8_w8a8", [128, 128])
    for config in found.values():
        assert set(config) <= set(default) | {"num_warps", "num_stages"} and config["BLOCK_SIZE_K"] == 128
    note = json.loads((tmp_path / "qwen3next.json").read_text())[done.written[0].name]
    assert note["source"] == held.source and "not measured on this engine's" in note["note"]


def test_what_vllm_ships_stays_in_force(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on("NVIDIA H200", monkeypatch)
    stock = fused_moe.get_moe_configs(512, 512, None)
    assert stock is not None
    done = export("vllm", tmp_path, BF16, "NVIDIA H200", (CONFIGS,))
    assert not done.written and done.shipped == ("E=512,N=512,device_name=NVIDIA_H200.json",)
    fused_moe.get_moe_configs.cache_clear()
    monkeypatch.setenv("VLLM_TUNED_CONFIG_FOLDER", str(tmp_path))
    assert fused_moe.get_moe_configs(512, 512, None) == stock


def test_its_own_folder_is_the_one_vllm_looks_in() -> None:
    assert shipped_folder("vllm") == Path(fused_moe.__file__).parent / "configs"
