"""Sorting pairs by expert, in one launch and in several, and tiles of pairs that need no sorting."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels.gemm.triton import quantize_tokens
from qwen3next_plugin.kernels.moe.triton.align import Tiles, align
from qwen3next_plugin.kernels.moe.triton.apart import tiles_apart
from qwen3next_plugin.kernels.moe.triton.ordered import tiles_in_order
from qwen3next_plugin.kernels.moe.ways import MANY_PAIRS, MOST_APART, apart, max_tiles

from .common import assert_repeatable


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
        tiles, counts = align(ids, experts, block)
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
    assert counts.tolist() == [flat.count(expert) for expert in range(experts)]
    used = [expert >= 0 for expert in tiles.experts.tolist()]
    assert used == sorted(used, reverse=True)  # unused tiles come last


@pytest.mark.parametrize(
    ("tokens", "experts", "block"), [(1200, 3, 16), (MANY_PAIRS // 2, 3, 16), (2500, 40, 64), (MANY_PAIRS, 513, 128)]
)
def test_more_pairs_than_one_scan(tokens: int, experts: int, block: int, device: str) -> None:
    """One scan after another, from `MANY_PAIRS` on chunks; pairs without an expert here, an expert without any."""
    ids = torch.randint(-1, experts + 1, (tokens, 2), dtype=torch.int32, device=device)
    ids[ids == experts // 2] = 0
    tiles, _ = align(ids, experts, block)
    flat = ids.flatten().cpu()
    placed = tiles.pairs.view(-1, block)[tiles.experts >= 0].cpu()
    of_expert = [(flat == expert).nonzero().flatten() for expert in range(experts)]
    assert tiles.experts[tiles.experts >= 0].tolist() == [
        expert for expert in range(experts) for _ in range(-(-len(of_expert[expert]) // block))
    ]
    assert torch.equal(placed[placed < flat.numel()].long(), torch.cat(of_expert))
    assert bool((placed.sort(dim=1).values == placed).all()), "padding comes last in a tile"


@pytest.mark.parametrize("routing", ["one expert", "first and last", "runs", "all skipped", "skewed", "int64"])
@pytest.mark.parametrize(("pairs", "experts"), [(MANY_PAIRS, 513), (MANY_PAIRS + 129, 7), (33_001, 129)])
def test_many_pairs_of_uneven_experts(routing: str, pairs: int, experts: int, device: str) -> None:
    """Chunks of one expert alone, of none, and of a last one that is not full; more chunks than are summed at once."""
    random = torch.Generator().manual_seed(pairs)
    ids = torch.randint(-1, experts + 1, (pairs,), generator=random, dtype=torch.int32)
    if routing == "one expert":
        ids.fill_(experts - 1)
    elif routing == "first and last":
        ids = torch.where(ids % 2 == 0, 0, experts - 1).int()
    elif routing == "runs":
        ids = (torch.arange(pairs) // 200 % experts).int()
    elif routing == "all skipped":
        ids = torch.where(ids % 2 == 0, -1, experts).int()
    elif routing == "skewed":
        ids = (torch.rand(pairs, generator=random) ** 8 * experts).int()
    elif routing == "int64":
        ids = ids.long()
    tiles, counts = align(ids.to(device)[:, None], experts, 64)
    held = ((ids >= 0) & (ids < experts)).nonzero().flatten()
    expected = held[ids[held].argsort(stable=True)]
    assert torch.equal(counts.cpu().long(), torch.bincount(ids[held], minlength=experts))
    placed = tiles.pairs.view(-1, 64)[tiles.experts >= 0].cpu()
    assert torch.equal(placed[placed < pairs].long(), expected)
    assert_repeatable(lambda: [align(ids.to(device)[:, None], experts, 64)[1]])


@given(counts=st.lists(st.integers(0, 40), min_size=1, max_size=8), block=st.sampled_from([1, 16, 64]))
def test_max_tiles_bounds_every_routing(counts: list[int], block: int) -> None:
    assert sum(-(-count // block) for count in counts) <= max_tiles(sum(counts), len(counts), block)


ROUTINGS = ["random", "one expert", "some skipped", "all skipped", "int64"]


def routed(tokens: int, top_k: int, experts: int, routing: str, device: str) -> torch.Tensor:
    ids = torch.rand(tokens, experts, device=device).argsort(dim=-1)[:, :top_k].int()
    ids[:, -1] = experts - 1  # as a shared one
    if routing == "one expert":
        ids.fill_(experts // 2)
    elif routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.3] = -1
        ids[-1, 0] = experts
    elif routing == "all skipped":
        ids.fill_(-1)
    elif routing == "int64":
        ids = ids.long()
    return ids


def assert_tiles(
    prepare: Callable[..., tuple[Tiles, torch.Tensor, torch.Tensor | None]],
    ids: torch.Tensor,
    experts: int,
    block: int,
) -> Tiles:
    """Every held pair in one tile of its expert, in order, padded at its end; tokens rounded as by themselves."""
    x = torch.randn(ids.shape[0], 306, device=ids.device).bfloat16()[:, 3:-3]
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills what is allocated with the largest integer
    try:
        tiles, codes, factors = prepare(ids, experts, block, x, rounds=True)
        plain, same, none = prepare(ids, experts, block, x, rounds=False)
    finally:
        torch.use_deterministic_algorithms(False)
    assert same is x and none is None and factors is not None
    expected, expected_factors = quantize_tokens(x)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(factors, expected_factors)
    assert torch.equal(plain.experts, tiles.experts)
    flat, num_pairs = ids.flatten().tolist(), ids.numel()
    found: dict[int, list[int]] = {}
    for expert, pairs in zip(tiles.experts.tolist(), tiles.pairs.view(-1, block).tolist(), strict=True):
        if expert < 0:
            assert expert == -1
            continue
        real = [pair for pair in pairs if pair != num_pairs]
        assert real and pairs == real + [num_pairs] * (block - len(real))
        found.setdefault(expert, []).extend(real)
    held = [expert for expert in range(experts) if expert in flat]
    assert found == {expert: [p for p in range(num_pairs) if flat[p] == expert] for expert in held}
    assert_repeatable(lambda: prepare(ids, experts, block, x, rounds=True)[1:])
    return tiles


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(("tokens", "top_k", "block"), [(1, 1, 16), (3, 11, 16), (17, 11, 16), (24, 8, 64)])
def test_tiles_apart(tokens: int, top_k: int, block: int, routing: str, device: str) -> None:
    """Up to the most pairs of one scan."""
    ids = routed(tokens, top_k, 260, routing, device)
    assert apart(ids.numel(), 260, block)
    assert assert_tiles(tiles_apart, ids, 260, block).max_tiles == ids.numel()


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block"), [(1, 1, 1, 16), (23, 3, 7, 16), (40, 11, 33, 64), (130, 10, 64, 32)]
)
def test_tiles_in_order(tokens: int, top_k: int, experts: int, block: int, routing: str, device: str) -> None:
    """Fewer and more pairs than a scan looks at, tiles by expert; no more of them than room was left for."""
    tiles = assert_tiles(tiles_in_order, routed(tokens, top_k, experts, routing, device), experts, block)
    used = [expert for expert in tiles.experts.tolist() if expert >= 0]
    assert used == sorted(used)


def test_when_pairs_need_no_sorting() -> None:
    """As many experts as pairs, but for what tiles of more than one pair leave; and no more than one scan."""
    assert apart(11, 513, 16) and apart(MOST_APART, 513, 16) and not apart(MOST_APART + 1, 513, 16)
    assert apart(17, 16, 16) and not apart(18, 16, 16) and not apart(11, 2, 16)
