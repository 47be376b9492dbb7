"""The mixture of experts at the model's real size, in CUDA graphs, and past 2**31 elements."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.early import can_begin_early
from qwen3next_plugin.kernels.moe import ways

from .common import assert_close, assert_repeatable, tolerance

pytestmark = pytest.mark.gpu
EXPERTS, HIDDEN, INNER, TOP_K = 512, 2048, 512, 10
CAN_BEGIN_EARLY = can_begin_early(torch.device("cuda", 0)) if torch.cuda.is_available() else False


def weights(fp8: bool) -> tuple[Any, ...]:
    """w13, w2 and their scales, made expert by expert so that no float32 copy of all of them is needed."""
    generator = torch.Generator("cuda").manual_seed(1)
    w13 = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16, generator=generator)
    w2 = torch.randn(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16, generator=generator)
    w13, w2 = w13 / HIDDEN**0.5, w2 / INNER**0.5
    if not fp8:
        return w13, w2, None, None
    q13, s13 = zip(*(gemm.quantize_block(w) for w in w13), strict=True)
    q2, s2 = zip(*(gemm.quantize_block(w) for w in w2), strict=True)
    return torch.stack(q13), torch.stack(q2), torch.stack(s13), torch.stack(s2)


def expected(
    x: torch.Tensor, w: tuple[Any, ...], router: torch.Tensor, ids: torch.Tensor, rounded: bool
) -> torch.Tensor:
    w13, w2, s13, s2 = w
    if s13 is None:
        w13, w2 = w13.double(), w2.double()
    return moe.reference.fused_moe(x.double(), w13, w2, router.double(), ids, s13, s2, rounded)


@pytest.mark.parametrize("mode", ["bf16", "fp8", "fp8 activations"])
def test_real_sizes(mode: str) -> None:
    w = weights(mode != "bf16")
    rounded = mode == "fp8 activations"
    for tokens in (1, 4, 8, 9, 16, 17, 18, 64, 1024):
        x = torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16)
        router, ids = moe.route(torch.randn(tokens, EXPERTS, device="cuda") * 2, TOP_K, True)
        actual = moe.fused_moe(x, w[0], w[1], router, ids, *w[2:], quantize_activations=rounded)
        limit = 3e-2 if rounded else tolerance(torch.bfloat16, 3)
        assert_close(actual, expected(x, w, router, ids, rounded), limit)
        assert_repeatable(moe.fused_moe, x, w[0], w[1], router, ids, *w[2:], quantize_activations=rounded)
        skewed = torch.full_like(ids, 7)
        actual = moe.fused_moe(x, w[0], w[1], router, skewed, *w[2:], quantize_activations=rounded)
        assert_close(actual, expected(x, w, router, skewed, rounded), limit)


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.usefixtures("poisoned_memory")
def test_beginning_early_changes_no_bit(fp8: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One step behind the other, as layers come: who reads what the first launch has not written yet, reads NaN."""
    w = weights(fp8)
    for tokens in (1, 3, ways.EARLY_TOKENS, 17, 40, 400):  # whole rows, and tiles however they are sorted
        found = []
        for early in (False, True):
            monkeypatch.setattr(ways, "can_begin_early", lambda device, early=early: early and CAN_BEGIN_EARLY)
            x = torch.linspace(-1, 1, tokens * HIDDEN, device="cuda").view(tokens, HIDDEN).to(torch.bfloat16)
            for _ in range(20):
                router, ids = moe.route(x[:, :EXPERTS], TOP_K, True)
                x = moe.fused_moe(x, w[0], w[1], router, ids, *w[2:])
                x = x / x.float().norm(dim=1, keepdim=True).to(x.dtype)
                found.append(x)
        assert all(torch.equal(late, soon) for late, soon in zip(found[:20], found[20:], strict=True))
        assert not torch.stack(found).isnan().any()


@pytest.mark.parametrize("fp8", [False, True])
@pytest.mark.parametrize("tokens", [4, 16, 20])
def test_routing_and_experts_in_a_cuda_graph_without_host_sync(tokens: int, fp8: bool) -> None:
    w = weights(fp8)
    x = torch.randn(tokens, HIDDEN, device="cuda").to(torch.bfloat16)
    logits = torch.randn(tokens, EXPERTS, device="cuda")

    def step() -> torch.Tensor:
        router, ids = moe.route(logits, TOP_K, True)
        return moe.fused_moe(x, w[0], w[1], router, ids, *w[2:])

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for _ in range(3):  # other routings than the captured one
        logits.normal_(std=3)
        x.normal_()
        graph.replay()
        assert torch.equal(out, step())


def test_experts_past_two_to_the_31_elements() -> None:
    experts = 1100  # 1100 * 1024 * 2048 = 2.3e9 one-byte weights
    one13, scale13 = gemm.quantize_block(torch.randn(2 * INNER, HIDDEN, device="cuda") / HIDDEN**0.5)
    one2, scale2 = gemm.quantize_block(torch.randn(HIDDEN, INNER, device="cuda") / INNER**0.5)
    w13 = torch.zeros(experts, 2 * INNER, HIDDEN, device="cuda", dtype=torch.float8_e4m3fn)
    w2 = torch.zeros(experts, HIDDEN, INNER, device="cuda", dtype=torch.float8_e4m3fn)
    s13, s2 = scale13.expand(experts, -1, -1).contiguous(), scale2.expand(experts, -1, -1).contiguous()
    w13[-1], w2[-1] = one13, one2
    x = torch.randn(3, HIDDEN, device="cuda").to(torch.bfloat16)
    ids = torch.full((3, 1), experts - 1, dtype=torch.int32, device="cuda")
    router = torch.ones(3, 1, device="cuda")
    actual = moe.fused_moe(x, w13, w2, router, ids, s13, s2)
    alone = moe.fused_moe(x, one13[None], one2[None], router, ids * 0, scale13[None], scale2[None])
    assert torch.equal(actual, alone)
