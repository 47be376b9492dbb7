"""Grouped products of several tiles a program: against the formula in float64, and what they leave unwritten."""

import pytest
import torch

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.gemm.reference import quantize_tokens
from qwen3next_plugin.kernels.moe.triton import tall
from qwen3next_plugin.kernels.moe.triton.align import align

FORMS = {
    "joined": tall.TallForm(3, tall.TallTile(128, 8, 3), tall.TallTile(128, 8, 3), False),
    "rounds 64": tall.TallForm(3, tall.TallTile(128, 8, 3, walks=5), tall.TallTile(128, 8, 3, walks=7), True),
    "split": tall.TallForm(3, tall.TallTile(256, 8, 3, split=True), tall.TallTile(64, 4, 3), True),
    "low": tall.TallForm(2, tall.TallTile(128, 4, 3, low=64, ahead=0), tall.TallTile(128, 4, 3, low=64), True),
    "shared": tall.TallForm(
        3, tall.TallTile(128, 8, 3, ahead=3), tall.TallTile(128, 8, 3, ahead=3, walks=4), True, shared_in_sum=True
    ),
    "behind": tall.TallForm(3, tall.TallTile(128, 8, 3, ahead=2), tall.TallTile(128, 8, 3, ahead=3), True),
    "described": tall.TallForm(
        3, tall.TallTile(256, 8, 3, split=True, ahead=2, described=True), tall.TallTile(128, 8, 3, described=True), True
    ),
}
EXPERTS, HIDDEN, INNER, TOP_K = 4, 256, 128, 3


def _inputs(tokens: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(tokens)
    x = torch.randn(tokens, HIDDEN).bfloat16()
    (w13, s13), (w2, s2) = (
        gemm.quantize_block((torch.randn(EXPERTS, *shape) / 16).bfloat16())
        for shape in ((2 * INNER, HIDDEN), (HIDDEN, INNER))
    )
    ids = torch.stack([torch.randperm(EXPERTS - 2)[:2] for _ in range(tokens)]).to(torch.int32)
    ids = torch.cat([ids, torch.full((tokens, 1), EXPERTS - 1, dtype=torch.int32)], 1)
    ids[::5, 0] = -1  # another rank's; expert 2 has no pair at all
    return x, w13, w2, torch.rand(tokens, TOP_K), ids, s13, s2


def _wide(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    return codes.double() * scale.double().repeat_interleave(128, -2).repeat_interleave(128, -1)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("tokens", [7, 150, 260])
def test_against_float64(name: str, tokens: int) -> None:
    x, w13, w2, router, ids, s13, s2 = _inputs(tokens)
    codes, scale = quantize_tokens(x)
    wide = codes.double() * scale.double().repeat_interleave(128, -1)
    expected = torch.zeros(tokens, HIDDEN, dtype=torch.float64)
    for choice in range(TOP_K):
        for token in range(tokens):
            expert = int(ids[token, choice])
            if expert >= 0:
                gate, up = (_wide(w13[expert], s13[expert]) @ wide[token]).chunk(2)
                inner = _wide(w2[expert], s2[expert]) @ (torch.nn.functional.silu(gate) * up)
                expected[token] += router[token, choice].double() * inner
    got = tall.fused_moe_tall(FORMS[name], x, w13, w2, router, ids, s13, s2)
    assert torch.equal(got, tall.fused_moe_tall(FORMS[name], x, w13, w2, router, ids, s13, s2))
    assert float((got.double() - expected).norm() / expected.norm()) < 0.03


@pytest.mark.parametrize("most", [1, 2, 3])
def test_groups_hold_every_tile_once(most: int) -> None:
    counts = [0, 1, 64, 65, 128, 129, 193, 0, 1025, 3]
    ids = torch.cat([torch.full((n,), e) for e, n in enumerate(counts)]).to(torch.int32)
    ids = ids[torch.randperm(len(ids), generator=torch.Generator().manual_seed(0))][:, None]
    tiles, _ = align(ids, len(counts), 64, most)
    assert tiles.groups is not None
    used = int(tiles.groups[-2])
    firsts, sizes = tiles.groups[:used] // 4, tiles.groups[:used] % 4
    assert used <= tiles.max_groups
    assert sizes.min() >= 1 and sizes.max() <= most
    held = [int(f) + i for f, n in zip(firsts, sizes, strict=True) for i in range(int(n))]
    assert held == list(range(sum(-(-n // 64) for n in counts)))
    experts = tiles.groups[tiles.max_groups : tiles.max_groups + used].tolist()
    for first, size, expert in zip(firsts.tolist(), sizes.tolist(), experts, strict=True):
        assert tiles.experts[first : first + size].tolist() == [expert] * size
