"""Files exported for SGLang's own fused MoE kernel: SGLang asks for these names, and still finds all it ships."""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from sglang.srt.layers.moe.moe_runner.triton_utils import fused_moe_triton_config as stock

from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import CONFIGS
from qwen3next_plugin.tune.export import export, sglang_name, shipped_folder
from qwen3next_plugin.tune.problem import TOKENS, Problem

TP1, TP2 = Problem(512, 512, 10, 2048, 512, "fp8"), Problem(512, 512, 10, 2048, 256, "fp8")
EXECUTION = SimpleNamespace(deterministic=SimpleNamespace(enable_deterministic_inference=False))


@pytest.fixture(autouse=True)
def _nothing_remembered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if hasattr(stock, "get_exec"):
        monkeypatch.setattr(stock, "get_exec", lambda: EXECUTION)
    stock.get_moe_configs.cache_clear()
    yield
    stock.get_moe_configs.cache_clear()


def on(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang takes the machine for one with this GPU."""
    monkeypatch.setattr(stock, "get_device_name", lambda: device)


def configs(experts: int, inner: int, down: bool = False) -> dict[int, dict[str, int]] | None:
    """What SGLang finds, not what it remembers."""
    stock.get_moe_configs.cache_clear()
    found: dict[int, dict[str, int]] | None = stock.get_moe_configs(experts, inner, "fp8_w8a8", 128, 128, down_moe=down)
    return found


@pytest.mark.parametrize("device", [gpu.name for gpu in KNOWN.values()])
@pytest.mark.parametrize("mode", ["bf16", "fp8"])
@pytest.mark.parametrize("down", [False, True])
def test_names_are_sglangs(device: str, mode: str, down: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    on(device, monkeypatch)
    dtype, shape = ("fp8_w8a8", [128, 128]) if mode == "fp8" else (None, [0, 0])
    expected = stock.get_config_file_name(513, 512, dtype, shape, False, down)
    assert sglang_name(513, 512, device, mode, 128, down) == expected


def test_sglang_reads_what_was_exported_with_and_without_the_shared_expert(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    on("NVIDIA H200", monkeypatch)
    assert configs(513, 256) is None
    done = export("sglang", tmp_path, TP2, "NVIDIA H200", (CONFIGS,))
    assert len(done.written) == 4 and not done.shipped
    variable, _, folder = done.variable.partition("=")
    monkeypatch.setenv(variable, folder)
    for experts in (512, 513):
        first, second = configs(experts, 256), configs(experts, 256, down=True)
        assert first is not None and second is not None and sorted(first) == sorted(second)
        assert set(first) == {24, *TOKENS}, "measured from 24 to 1,024 tokens, the rest computed"
        assert first != second
        for tokens in TOKENS:
            assert first[tokens]["BLOCK_SIZE_M"] == second[tokens]["BLOCK_SIZE_M"], "both products share one sorting"
            assert first[tokens]["BLOCK_SIZE_K"] == second[tokens]["BLOCK_SIZE_K"] == 128
    notes = json.loads((tmp_path / "qwen3next.json").read_text())
    assert set(notes) == {str(path.relative_to(tmp_path)) for path in done.written}


def test_all_that_sglang_ships_is_still_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The variable replaces its folder, older versions of Triton that it falls back to included."""
    on("NVIDIA H200", monkeypatch)
    before, before_down = configs(513, 512), configs(513, 512, down=True)
    assert before is not None and before_down is not None, "shipped for TP1"
    done = export("sglang", tmp_path, TP1, "NVIDIA H200", (CONFIGS,))
    assert [path.name.split(",")[0] for path in done.written] == ["E=512", "E=512"]
    assert [name.split(",")[0] for name in done.shipped] == ["E=513"]
    monkeypatch.setenv("SGLANG_MOE_CONFIG_DIR", str(tmp_path))
    assert configs(513, 512) == before and configs(513, 512, down=True) == before_down
    own = shipped_folder("sglang")
    for path in own.rglob("*.json"):
        assert (tmp_path / "configs" / path.relative_to(own)).read_bytes() == path.read_bytes()


def test_its_own_folder_is_the_one_sglang_looks_in() -> None:
    assert shipped_folder("sglang") == Path(stock.__file__).parent / "configs"
