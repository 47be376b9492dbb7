"""Sorting pairs by expert."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels.moe.triton.align import align, max_tiles
from qwen3next_plugin.kernels.moe.ways import MANY_PAIRS


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


@pytest.mark.parametrize(
    ("tokens", "experts", "block"), [(1200, 3, 16), (MANY_PAIRS // 2, 3, 16), (2500, 40, 64), (MANY_PAIRS, 513, 128)]
)
def test_more_pairs_than_one_scan(tokens: int, experts: int, block: int, device: str) -> None:
    """One scan after another, from `MANY_PAIRS` on chunks; pairs without an expert here, an expert without any."""
    ids = torch.randint(-1, experts + 1, (tokens, 2), dtype=torch.int32, device=device)
    ids[ids == experts // 2] = 0
    tiles = align(ids, experts, block)
    flat = ids.flatten().cpu()
    placed = tiles.pairs.view(-1, block)[tiles.experts >= 0].cpu()
    of_expert = [(flat == expert).nonzero().flatten() for expert in range(experts)]
    assert tiles.experts[tiles.experts >= 0].tolist() == [
        expert for expert in range(experts) for _ in range(-(-len(of_expert[expert]) // block))
    ]
    assert torch.equal(placed[placed < flat.numel()].long(), torch.cat(of_expert))
    assert bool((placed.sort(dim=1).values == placed).all()), "padding comes last in a tile"


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), block=st.sampled_from([1, 16, 64]))
def test_max_tiles_bounds_every_routing(counts: list[int], block: int) -> None:
    assert sum(-(-count // block) for count in counts) <= max_tiles(sum(counts), len(counts), block)
