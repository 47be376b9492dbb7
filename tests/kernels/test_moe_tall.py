"""Experts of many tokens in tall tiles: against the formula in float64, in what they leave alone, and when they run."""

import pytest
import torch
from torch import Tensor

from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.dispatch import table
from qwen3next_plugin.kernels.gemm.triton import quantize_tokens
from qwen3next_plugin.kernels.gpus import Target
from qwen3next_plugin.kernels.moe import peers, tall_rule, ways
from qwen3next_plugin.kernels.moe.config import default_config, forced
from qwen3next_plugin.kernels.moe.triton.tall import fused_moe_tall

from .common import assert_close, assert_repeatable

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HOPPER = Target("NVIDIA H200", (9, 0))
# An activated value that is rounded to 16 bits first may get the code of FP8 beside the formula's; and a sum on FP8
# tensor cores, which keep about 14 bits of it.
LIMITS = {torch.float32: 2e-3, torch.float16: 1e-2, torch.bfloat16: 4e-2}
LIMITS_ON_GPUS = LIMITS | {torch.float32: 1e-2}

EXPERTS, HIDDEN = 5, 256


def _case(tokens: int, inner: int, ids: Tensor, dtype: torch.dtype, device: str) -> tuple[Tensor, ...]:
    """A step whose blocks differ in their factors, so that a wrong one shows."""
    torch.manual_seed(tokens + inner)
    matrices: list[Tensor] = []
    factors: list[Tensor] = []
    for shape in ((2 * inner, HIDDEN), (HIDDEN, inner)):
        blocks = torch.rand(EXPERTS, shape[0] // 128, shape[1] // 128).mul(2).exp()
        wide = torch.randn(EXPERTS, *shape) * blocks.repeat_interleave(128, 1).repeat_interleave(128, 2)
        codes, scale = gemm.quantize_block((wide / 4 / shape[1] ** 0.5).to(device))
        matrices.append(codes)
        factors.append(scale)
    x = (torch.randn(tokens, HIDDEN) * torch.rand(tokens, 2).exp().repeat_interleave(128, 1)).to(device, dtype)
    return x, *matrices, torch.rand(ids.shape, device=device), ids.to(device), *factors


def _routing(name: str, tokens: int) -> Tensor:
    """Three choices a token, the last of them the shared expert's; expert 2 has no pair in any of them."""
    random = torch.Generator().manual_seed(tokens)
    ids = torch.tensor([0, 1, 3])[torch.stack([torch.randperm(3, generator=random)[:2] for _ in range(tokens)])]
    ids = torch.cat([ids, torch.full((tokens, 1), EXPERTS - 1)], dim=1).to(torch.int32)
    if name == "some skipped":
        ids[::3, 0] = -1
        ids[1::4, 1:] = EXPERTS  # another rank's, too
    elif name == "one expert":
        ids[:, :2] = 3
    elif name == "all skipped":
        ids.fill_(-1)
    return ids


def _wide(codes: Tensor, scale: Tensor) -> Tensor:
    return codes.cpu().double() * scale.cpu().double().repeat_interleave(128, -2).repeat_interleave(128, -1)


def _formula(call: tuple[Tensor, ...]) -> Tensor:
    """In float64, from tokens and activated values that are rounded to FP8 as the kernels round them."""
    x, w13, w2, router, ids, s13, s2 = call

    def rounded(values: Tensor) -> Tensor:
        codes, factors = quantize_tokens(values.to(x.device, x.dtype))
        return codes.cpu().double() * factors.cpu().double().repeat_interleave(128, -1)

    out = torch.zeros(x.shape, dtype=torch.float64)
    wide = rounded(x)
    for expert in range(EXPERTS):
        tokens, choices = (ids.cpu() == expert).nonzero(as_tuple=True)
        if tokens.numel():
            gate, up = (wide[tokens] @ _wide(w13[expert], s13[expert]).T).chunk(2, dim=1)
            inner = rounded(torch.nn.functional.silu(gate) * up)
            value = inner @ _wide(w2[expert], s2[expert]).T * router.cpu().double()[tokens, choices, None]
            out.index_add_(0, tokens, value)
    return out


def _check(call: tuple[Tensor, ...], device: str) -> None:
    limits = LIMITS_ON_GPUS if device == "cuda" else LIMITS
    assert_close(fused_moe_tall(*call), _formula(call), limits[call[0].dtype])


@pytest.mark.parametrize("routing", ["ragged", "some skipped", "one expert", "all skipped"])
@pytest.mark.parametrize(
    ("tokens", "inner", "dtype"),
    [(1, 128, torch.float32), (65, 256, torch.bfloat16), (150, 512, torch.float32), (260, 128, torch.float16)],
)
def test_against_float64(tokens: int, inner: int, dtype: torch.dtype, routing: str, device: str) -> None:
    """Tiles of one row and of all, both halves of a tile and one, experts without a pair, pairs without an expert."""
    call = _case(tokens, inner, _routing(routing, tokens), dtype, device)
    _check(call, device)
    assert_repeatable(lambda: fused_moe_tall(*call))


def test_parts_of_wider_tensors(device: str) -> None:
    """Of tokens, weights and factors; the latter column by column."""
    x, w13, w2, router, ids, s13, s2 = _case(70, 128, _routing("some skipped", 70), torch.float32, device)

    def padded(t: Tensor) -> Tensor:
        wide = torch.zeros(*t.shape[:-1], t.shape[-1] + 16, dtype=t.dtype, device=device)
        wide[..., : t.shape[-1]] = t
        return wide[..., : t.shape[-1]]

    call = (padded(x), padded(w13), padded(w2), router, ids, s13.mT.contiguous().mT, s2.mT.contiguous().mT)
    _check(call, device)


def test_the_bits_of_the_other_kernels(device: str) -> None:
    """Sums run in the same order, so it does not show which of them run."""
    call = _case(90, 256, _routing("some skipped", 90), torch.bfloat16, device)
    with forced(tall_rule.TILES):
        other = moe.fused_moe(*call, quantize_activations=True, backend="triton")
    assert torch.equal(fused_moe_tall(*call), other)


def _way(tokens: int, w13: Tensor, s13: Tensor | None, quantize: bool | None = True) -> ways.Way:
    return ways.choose_way(tokens, 11, 2, w13, s13, quantize, 1)


def test_when_they_run(monkeypatch: pytest.MonkeyPatch) -> None:
    capability = (9, 0)
    monkeypatch.setattr(tall_rule, "capability_of", lambda device: capability)
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    w13, s13, least = torch.zeros(5, 256, 256).to(gemm.FP8), torch.zeros(5, 2, 2), tall_rule.MIN_TOKENS
    way = _way(least, w13, s13)
    assert way == ways.Way(True, tall_rule.TILES, 0, True, tall=True)
    assert way == _way(8 * least, w13, s13) == _way(least, w13, s13, None)
    assert not _way(least - 1, w13, s13).tall
    assert not _way(least, w13, s13, False).tall
    assert not _way(least, w13.float(), None).tall
    assert not _way(least, w13, torch.zeros(5, 4, 4)).tall, "blocks of 64"
    assert not _way(least, w13, torch.zeros(5, 256, 1)).tall, "a factor a row"
    assert not _way(least, w13[:, :128], torch.zeros(5, 2, 2)).tall, "an expert 64 wide"
    with forced(default_config(11 * least, 5, 1)):
        assert not _way(least, w13, s13).tall, "tiles that are measured are those that are named"
    (found,) = [span for way, span in ways.ways_up_to(least + 2, 11, 2, w13, s13, True, 1).items() if way.tall]
    assert found == (least, least + 2)
    capability = (8, 9)
    assert not _way(least, w13, s13).tall


def test_an_engines_product_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = peers.Plan("deepgemm", 128, 1)
    monkeypatch.setattr(tall_rule, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(ways, "plan_for", lambda tokens, *rest: plan if tokens >= 6144 else None)
    w13, s13 = torch.zeros(5, 256, 256).to(gemm.FP8), torch.zeros(5, 2, 2)
    assert _way(6143, w13, s13).tall and _way(6144, w13, s13).plan is plan and not _way(6144, w13, s13).tall


def test_a_step_of_many_runs_them(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(tall_rule, "capability_of", lambda device: (9, 0))
    monkeypatch.setattr(tall_rule, "MIN_TOKENS", 70)
    call = _case(70, 128, _routing("ragged", 70), torch.bfloat16, device)
    monkeypatch.setattr("qwen3next_plugin.kernels.moe.triton.experts.align", None)  # what the other products need
    got = moe.fused_moe(*call, quantize_activations=True, num_shared=1, backend="triton")
    assert torch.equal(got, fused_moe_tall(*call))


def test_the_table_says_when_and_why() -> None:
    def said(target: Target) -> list[str]:
        return [f"{row.choice.shapes}: {row.choice.why}" for row in table(target) if row.operation == "fused_moe"]

    assert [line for line in said(HOPPER) if line.startswith(f"from {tall_rule.MIN_TOKENS} tokens, FP8 blocks of 128")]
    assert not [line for line in said(Target("NVIDIA L40S", (8, 9))) if f"from {tall_rule.MIN_TOKENS} tokens" in line]
