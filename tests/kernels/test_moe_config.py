"""Which tiles the mixture of experts runs: the table, config files, a user's folder, and what the log says of them."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gpus
from qwen3next_plugin.kernels.moe import config
from qwen3next_plugin.kernels.moe.config import Entry, MoeConfig, Tile

SMALL, LARGE = config.default_config(1, 1, 2), config.default_config(1000, 1, 2)
NAME = "E=4,H=16,I=8,dtype=bfloat16.json"


class OnGpu:
    """Weights that say they are on a GPU."""

    shape, dtype, device, is_cuda = (4, 16, 16), torch.bfloat16, torch.device("cuda", 0), True


W13: Any = OnGpu()


@pytest.fixture(autouse=True)
def _a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """A GPU of this name, no shipped files for it, and nothing remembered."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H4711 80GB")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(config, "CONFIGS", tmp_path / "shipped")
    monkeypatch.setattr(config, "_user_folder", None)
    for cached in (config._from_files, config._gpu_of, config.read_file):
        cached.cache_clear()
    yield
    for cached in (config._from_files, config._gpu_of, config.read_file):
        cached.cache_clear()


def write(folder: Path, entries: list[tuple[int, int, MoeConfig]], source: str = "measured", name: str = NAME) -> Path:
    path = folder / "h4711" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    listed = [
        {"tokens": tokens, "activation_bytes": size, "config": config.config_object(c)} for tokens, size, c in entries
    ]
    path.write_text(json.dumps({"format": 1, "source": source, "entries": listed}))
    return path


@pytest.mark.parametrize(
    ("dtype", "columns", "activation_bytes", "name"),
    [(torch.uint8, 8, 2, "int4_w4a16"), (torch.int8, 16, 2, "int8_w8a16"), (torch.int8, 16, 1, "int8_w8a8")],
)
def test_integer_weights_have_files_and_a_table_of_their_own(
    dtype: torch.dtype, columns: int, activation_bytes: int, name: str, tmp_path: Path
) -> None:
    weights: Any = type("W", (), {"shape": (4, 16, columns), "dtype": dtype, "device": W13.device, "is_cuda": True})()
    table = config.default_config(8, 4, activation_bytes, True)
    assert table.gate_up.block_k == 128 and config.choose_config(4, 2, weights, activation_bytes) == table
    write(tmp_path / "shipped", [(1, activation_bytes, LARGE)], name=f"E=4,H=16,I=8,dtype={name}.json")
    config._from_files.cache_clear()
    assert config.choose_config(4, 2, weights, activation_bytes) == LARGE


def test_default_tiles_grow_with_the_rows_of_an_expert() -> None:
    blocks = [config.default_config(tokens * 10, 512, 2).block_m for tokens in (1, 512, 1024, 4096, 32768)]
    assert blocks == [16, 16, 32, 64, 128]


@pytest.mark.parametrize("activation_bytes", [1, 2, 4])
@pytest.mark.parametrize("rows", [1, 20, 100, 1000])
def test_default_tiles_fit_the_smallest_shared_memory(rows: int, activation_bytes: int) -> None:
    """A stage holds activations and a tile of weights (two for gate and up); 99 KiB is what sm 8.6 and 8.9 have."""
    chosen = config.default_config(rows, 1, activation_bytes)
    for tile, weights in ((chosen.gate_up, 2), (chosen.down, 1)):
        stage = (chosen.block_m + weights * tile.block_n) * tile.block_k * activation_bytes
        assert stage * tile.num_stages <= 99 * 1024


def test_the_shipped_file_of_this_gpu_and_shape_is_used(tmp_path: Path) -> None:
    assert config.choose_config(4, 2, W13, 2) == config.default_config(8, 4, 2)
    config._from_files.cache_clear()
    write(config.CONFIGS, [(1, 2, SMALL), (100, 2, LARGE)])
    assert config.choose_config(4, 2, W13, 2) == SMALL
    assert config.choose_config(5000, 2, W13, 2) == LARGE


def test_a_users_folder_comes_before_the_shipped_files(tmp_path: Path) -> None:
    write(config.CONFIGS, [(1, 2, SMALL)])
    write(tmp_path / "own", [(1, 2, LARGE)])
    config.use_folder(tmp_path / "own")
    assert config.choose_config(1, 2, W13, 2) == LARGE
    config.use_folder(None)
    assert config.choose_config(1, 2, W13, 2) == SMALL


def test_what_is_forced_comes_before_everything(tmp_path: Path) -> None:
    write(config.CONFIGS, [(1, 2, SMALL)])
    with config.forced(LARGE):
        assert config.choose_config(1, 2, W13, 2) == LARGE
        with config.forced(SMALL):
            assert config.choose_config(1, 2, W13, 2) == SMALL
        assert config.choose_config(1, 2, torch.empty(4, 16, 16), 2) == LARGE
    assert config.choose_config(1, 2, W13, 2) == SMALL


@given(
    counts=st.lists(st.integers(1, 10_000), min_size=1, unique=True),
    tokens=st.integers(0, 20_000),
    activation_bytes=st.sampled_from([1, 2]),
)
def test_the_nearest_by_ratio_among_those_with_such_activations(
    counts: list[int], tokens: int, activation_bytes: int
) -> None:
    def marked(n: int) -> MoeConfig:
        return MoeConfig(16, Tile(64, 64, 4, n), Tile(64, 64, 4, 2))

    entries = tuple(Entry(n, 1 + n % 2, marked(n)) for n in counts)
    found = config.nearest(entries, tokens, activation_bytes)
    fitting = [n for n in counts if 1 + n % 2 == activation_bytes]
    if not fitting:
        assert found is None
        return
    assert found is not None
    taken, asked = found.gate_up.num_stages, max(tokens, 1)
    ratio = max(taken / asked, asked / taken)
    assert taken in fitting and all(ratio <= max(n / asked, asked / n) * (1 + 1e-9) for n in fitting)


def test_of_two_equally_near_the_smaller() -> None:
    entries = (Entry(16, 2, LARGE), Entry(4, 2, SMALL))
    assert config.nearest(entries, 8, 2) == SMALL


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"format": 2, "source": "measured", "entries": []}', '{"format": 1, "source": "x", "entries": []}',
     '{"format": 1, "source": "measured", "entries": [{"tokens": 1, "activation_bytes": 2, "config": {}}]}'],
)  # fmt: skip
def test_a_damaged_file_is_named_when_the_folder_is_given(text: str, tmp_path: Path) -> None:
    path = write(tmp_path, [])
    path.write_text(text)
    with pytest.raises(ValueError, match=r"E=4,H=16,I=8,dtype=bfloat16\.json is not a config file of format 1"):
        config.use_folder(tmp_path)


def test_a_folder_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nowhere is not a folder"):
        config.use_folder(tmp_path / "nowhere")


def test_the_log_says_where_configs_come_from(tmp_path: Path) -> None:
    assert "none, a table for all GPUs; `qwen3next tune moe`" in config.config_text("h4711")
    write(config.CONFIGS, [], "model")
    write(config.CONFIGS, [], "model", "E=8,H=16,I=8,dtype=bfloat16.json")
    text = config.config_text("h4711")
    assert text == "configs for h4711: 2 computed from its properties; `qwen3next tune moe` measures them"
    write(tmp_path / "own", [])
    config.use_folder(tmp_path / "own")
    assert "1 computed from its properties and 1 measured by you; `qwen3next" in config.config_text("h4711")


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("NVIDIA H200", "h200"),
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H20-3e", "h20"),
        ("NVIDIA A100-SXM4-80GB", "a100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
        ("NVIDIA GB10", "gb10"),
        ("CPU x86_64", "cpu"),
        ("NVIDIA", "unknown"),
    ],
)
def test_short_names_of_gpus(name: str, slug: str) -> None:
    assert gpus.gpu_slug(name) == slug


def test_ten_gpus_are_known_with_their_sources() -> None:
    expected = ("h200", "h100", "h20", "a100", "a800", "l40s", "rtx-4090", "rtx-5090", "b200", "gb10")
    assert tuple(gpus.KNOWN) == expected
    for gpu in gpus.KNOWN.values():
        assert gpu.source and (gpu.fp8 is None) == (gpu.capability < (8, 9))
