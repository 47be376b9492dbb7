"""Sorting pairs by expert, and the choice of tile sizes."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels.moe import config
from qwen3next_plugin.kernels.moe.triton.align import align, max_tiles


@given(data=st.data())
def test_pairs_are_sorted_into_tiles_of_one_expert(data: st.DataObject, device: str) -> None:
    experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, 3))
    rows = data.draw(
        st.lists(st.lists(st.integers(-1, experts), min_size=top_k, max_size=top_k), min_size=1, max_size=14)
    )
    block = data.draw(st.sampled_from([16, 32]))
    ids = torch.tensor(rows, dtype=torch.int32, device=device)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with the largest integer
    try:
        tiles = align(ids, experts, block)
    finally:
        torch.use_deterministic_algorithms(False)
    flat, num_pairs = ids.flatten().tolist(), ids.numel()
    placed, seen = tiles.pairs.view(-1, block).tolist(), []
    for expert, pairs in zip(tiles.experts.tolist(), placed, strict=True):
        if expert < 0:
            continue
        real = [pair for pair in pairs if pair != num_pairs]
        assert real and pairs == real + [num_pairs] * (block - len(real))
        assert all(flat[pair] == expert for pair in real)
        seen += real
    assert seen == [pair for expert in range(experts) for pair in range(num_pairs) if flat[pair] == expert]
    used = [expert >= 0 for expert in tiles.experts.tolist()]
    assert used == sorted(used, reverse=True)  # unused tiles come last


def test_more_pairs_than_one_scan(device: str) -> None:
    ids = torch.randint(0, 3, (1200, 2), dtype=torch.int32, device=device)
    tiles = align(ids, 3, 16)
    flat = ids.flatten().cpu()
    real = tiles.pairs[: int((tiles.experts >= 0).sum()) * 16].cpu()
    expected = torch.cat([(flat == expert).nonzero().flatten() for expert in range(3)])
    assert torch.equal(real[real < flat.numel()].long(), expected)


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), block=st.sampled_from([1, 16, 64]))
def test_max_tiles_bounds_every_routing(counts: list[int], block: int) -> None:
    assert sum(-(-count // block) for count in counts) <= max_tiles(sum(counts), len(counts), block)


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


def test_measured_tiles_are_read_and_the_nearest_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = config.default_config(1, 1, 2), config.default_config(1000, 1, 2)
    folder = tmp_path / "Some_GPU"
    folder.mkdir()
    (folder / "moe_E=4_H=16_I=8_bfloat16.json").write_text(json.dumps({"1": asdict(small), "100": asdict(large)}))
    tuned = config.tuned_configs(tmp_path, "Some GPU", 4, 16, 8, "bfloat16")
    assert tuned == {1: small, 100: large}
    assert config.tuned_configs(tmp_path, "Some GPU", 4, 16, 8, "float16") == {}

    class OnGpu:
        shape, dtype, device, is_cuda = (4, 16, 16), torch.bfloat16, torch.device("cuda", 0), True

    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    assert config.choose_config(40, 2, OnGpu(), 2, tmp_path) == small  # type: ignore[arg-type]
    assert config.choose_config(5000, 2, OnGpu(), 2, tmp_path) == large  # type: ignore[arg-type]
