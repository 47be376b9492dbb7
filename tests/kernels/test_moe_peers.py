"""The experts by an engine's grouped product: a stand-in with its calling convention serves like our own, or not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import dispatch, moe
from qwen3next_plugin.kernels.gpus import NO_GPU, Target
from qwen3next_plugin.kernels.integers import padded_tokens
from qwen3next_plugin.kernels.moe import config, peer_table, peer_trial, peers, ways
from qwen3next_plugin.kernels.moe.peers import ExpertShape, Peer, rows_for

from .common import assert_close, assert_repeatable
from .moe_case import Problem, problem, random_ids
from .moe_peer_case import DEVICE, SHAPE, FakeDeepGemm, empty_registry, rule

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy rounds rows that no pair uses
]
EXPERTS, HIDDEN, INNER = SHAPE
HOPPER = Target("NVIDIA H100 80GB HBM3", (9, 0))


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(peer_trial, "TOKENS", 12)
    with empty_registry(rule()), DEVICE:  # what is made here is made where kernels run
        yield


def case(ids: torch.Tensor, dtype: torch.dtype = torch.bfloat16, experts: int = EXPERTS) -> Problem:
    return problem(ids, experts, HIDDEN, INNER, "fp8 activations", dtype)


def offer(fake: FakeDeepGemm | None = None, shape: ExpertShape = SHAPE) -> FakeDeepGemm:
    """The stand-in, tried; what it is asked for from then on is counted."""
    fake = fake or FakeDeepGemm()
    peers.OFFERS.offer(fake.peer())
    peers.try_offers(shape, DEVICE)
    fake.rows.clear()
    return fake


def plan(tokens: int, w13: torch.Tensor | None = None, scale: torch.Tensor | None = None) -> peers.Plan | None:
    if w13 is None:
        _, w13, _, _, _, scale, _ = case(random_ids(1, EXPERTS, 2, DEVICE)).tensors
    return peers.plan_for(tokens, 2, w13, scale)


@pytest.mark.parametrize("alignment", [16, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("routing", ["random", "skewed", "one expert", "skipped", "past the last", "int64"])
def test_against_float64(routing: str, dtype: torch.dtype, alignment: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_table, "RULES", (rule(alignment=alignment),))
    fake = offer()
    ids = random_ids(37, EXPERTS, 2, DEVICE)
    if routing == "skewed":  # two experts have none, one has nearly all
        ids[:, 0], ids[:, 1] = 2, torch.where(torch.rand(37) < 0.1, 0, -1)
    elif routing == "one expert":
        ids[:, 0], ids[:, 1] = 3, -1
    elif routing == "skipped":
        ids[torch.rand(ids.shape) < 0.4] = -1
        ids[5] = -1
    elif routing == "past the last":
        ids[3], ids[5, 0] = EXPERTS, 1_000_000
    elif routing == "int64":
        ids = ids.long()
    asked = case(ids, dtype)
    out = asked.run("triton")
    assert fake.rows == [rows_for(37, 2, EXPERTS, alignment)] * 2
    assert_close(out, asked.expected(), 4e-2)
    assert not out[((ids < 0) | (ids >= EXPERTS)).all(dim=1)].any()


def test_nothing_routed_and_no_tokens() -> None:
    fake = offer()
    out = case(torch.full((9, 2), -1, dtype=torch.int32)).run("triton")
    assert len(fake.rows) == 2 and not out.any()
    assert case(torch.empty(0, 2, dtype=torch.int32)).run("triton").shape == (0, HIDDEN)
    assert len(fake.rows) == 2


def test_many_pairs_are_sorted_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "MANY_PAIRS", 64)
    fake = offer()
    asked = case(random_ids(50, EXPERTS, 3, DEVICE))
    assert_close(asked.run("triton"), asked.expected(), 4e-2)
    assert len(fake.rows) == 2


def test_it_is_no_further_from_float64_than_rounding_to_bfloat16_between_the_products_makes() -> None:
    """Our own kernels round what they activated from float32."""
    asked = case(random_ids(40, EXPERTS, 2, DEVICE))
    own = asked.run("triton")
    fake = offer()
    got, expected = asked.run("triton"), asked.expected()
    assert len(fake.rows) == 2 and not torch.equal(own, got)
    errors = [float((out - expected).norm() / expected.norm()) for out in (own, got)]
    assert errors[1] < 0.02, errors


def test_results_repeat_and_inputs_stay() -> None:
    fake = offer()
    asked = case(random_ids(21, EXPERTS, 2, DEVICE))
    before = [t.clone() for t in asked.tensors]
    assert_repeatable(asked.run, "triton")
    assert len(fake.rows) >= 4
    for a, b in zip(asked.tensors, before, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_a_token_does_not_depend_on_its_batch() -> None:
    offer()
    asked = case(random_ids(21, EXPERTS, 2, DEVICE))
    x, w13, w2, router, ids, s13, s2 = asked.tensors
    together, rows = asked.run("triton"), slice(3, 8)
    alone = Problem((x[rows], w13, w2, router[rows], ids[rows], s13, s2), True).run("triton")
    assert torch.equal(alone, together[rows])


def test_the_number_of_tokens_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_table, "RULES", (rule(40, 64), rule(20, 16)))
    offer()
    assert [plan(tokens) for tokens in (1, 19)] == [None, None]
    assert [found and found.alignment for found in map(plan, (20, 39, 40, 5000))] == [16, 16, 64, 64]
    monkeypatch.setattr(peer_table, "MIN_TOKENS", 10)
    for wish, least in (("own", None), ("deepgemm", 10)):
        peers.OFFERS.prefer(wish)
        assert [plan(tokens) is not None for tokens in (9, 10, 100)] == [
            least is not None and tokens >= least for tokens in (9, 10, 100)
        ]


def test_only_blocks_that_were_tried_and_are_to_be_rounded(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = offer()
    ids = random_ids(17, EXPERTS, 2, DEVICE)
    case(ids, experts=EXPERTS + 1).run("triton")
    problem(ids, EXPERTS, HIDDEN, INNER).run("triton")
    problem(ids, EXPERTS, HIDDEN, INNER, "fp8 activations", inner_block=64).run("triton")
    x, w13, w2, router, _, s13, s2 = case(ids).tensors
    moe.fused_moe(x, w13, w2, router, ids, s13, s2, quantize_activations=False, backend="triton")
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: False)
    moe.fused_moe(x, w13, w2, router, ids, s13, s2, backend="triton")
    with config.forced(config.default_config(34, EXPERTS, 1)):
        case(ids).run("triton")
    assert not fake.rows
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    moe.fused_moe(x, w13, w2, router, ids, s13, s2, num_shared=1, backend="triton")
    assert len(fake.rows) == 2


@pytest.mark.parametrize("spoiled", ["factors", "experts"])
def test_an_offer_of_another_convention_is_withdrawn_with_the_reason(spoiled: str) -> None:
    offer(FakeDeepGemm(spoiled))
    assert plan(100) is None
    assert "no deepgemm: its results differ from this plugin's by" in dispatch.describe("cuda")["fused_moe"]


def test_an_offer_that_raises_is_withdrawn_with_the_reason() -> None:
    def broken(call: peers.PeerCall) -> None:
        raise RuntimeError("no compiler\nin this place")

    peers.OFFERS.offer(Peer("deepgemm", broken))
    peers.try_offers(SHAPE, DEVICE)
    assert plan(100) is None
    assert "; no deepgemm: RuntimeError: no compiler;" in dispatch.describe("cuda")["fused_moe"]


@pytest.mark.parametrize(
    ("shape", "why"), [(ExpertShape(4, 256, 64), "64 and 256"), (ExpertShape(4, 192, 128), "128 and 192")]
)
def test_an_offer_for_other_blocks_is_not_tried(shape: ExpertShape, why: str) -> None:
    fake = FakeDeepGemm()
    peers.OFFERS.offer(fake.peer())
    peers.try_offers(shape, DEVICE)
    assert peers.OFFERS.missing == {"deepgemm": f"not for matrices of {why} columns: FP8 blocks have 128"}
    assert not fake.rows


def test_tiles_of_every_height_in_the_table_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(peer_table, "RULES", (rule(40, 64), rule(20, 16)))

    def only_low(call: peers.PeerCall) -> None:
        if call.alignment > 16:
            raise RuntimeError("too high")
        FakeDeepGemm().peer().function(call)

    peers.OFFERS.offer(Peer("deepgemm", only_low))
    peers.try_offers(SHAPE, DEVICE)
    assert peers.OFFERS.missing == {"deepgemm": "RuntimeError: too high"} and plan(20) is None


def test_narrow_experts_stay_with_our_own(monkeypatch: pytest.MonkeyPatch) -> None:
    wide = replace(rule(20), min_inner=2 * INNER)
    monkeypatch.setattr(peer_table, "RULES", (wide,))
    offer()
    assert plan(5000) is None and not peers.OFFERS.shapes_of("deepgemm"), "what is never chosen is not tried"
    assert not peers.OFFERS.missing
    assert peers.peer_choices(NO_GPU) == []
    peers.OFFERS.prefer("deepgemm")
    peers.try_offers(SHAPE, DEVICE)
    assert plan(5000) is not None, "a user who names it gets it"
    monkeypatch.setattr(peer_table, "RULES", (replace(wide, min_inner=INNER),))
    peers.OFFERS.prefer("auto")
    assert plan(5000) is not None


def test_a_wish_that_cannot_be_had_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    peers.OFFERS.prefer("deepgemm")
    with pytest.raises(ValueError, match="experts of prefills by 'deepgemm' was asked for.*no engine offers it; ask"):
        peers.try_offers(SHAPE, DEVICE)
    monkeypatch.setattr(peer_table, "RULES", ())
    with pytest.raises(ValueError, match="it cannot be had: not for GPUs of compute capability 0.0"):
        offer()


def test_what_is_chosen_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(target: Target) -> list[str]:
        return [f"{choice.runs} {choice.shapes}: {choice.why}" for choice in peers.peer_choices(target)]

    monkeypatch.setattr(peer_table, "RULES", (peer_table.Rule((9, 0), "deepgemm", 2048, 128, ""), rule(20)))
    hoped = "where the engine has it and its trial at start succeeds"
    assert said(HOPPER) == [f"deepgemm from 2048 tokens, FP8 blocks: {hoped}"]
    monkeypatch.setattr(peer_table, "RULES", (peer_table.Rule((9, 0), "deepgemm", 7168, 128, "", 512),))
    assert said(HOPPER) == [f"deepgemm from 7168 tokens, FP8 blocks of 512 columns and more an expert: {hoped}"]
    assert said(Target("NVIDIA L40S", (8, 9))) == []
    monkeypatch.setattr(peer_table, "RULES", (rule(20),))
    offer()
    assert said(NO_GPU) == ["deepgemm from 20 tokens, FP8 blocks: the engine's, tried at its start"]
    assert "deepgemm from 20 tokens, FP8 blocks: the engine's" in dispatch.describe("cuda")["fused_moe"]
    peers.OFFERS.prefer("deepgemm")
    assert said(NO_GPU) == [
        f"deepgemm from {peer_table.MIN_TOKENS} tokens, FP8 blocks: the engine's, tried at its start"
    ]


def test_few_numbers_of_rows_fit_any_routing() -> None:
    numbers = [padded_tokens(tokens) for tokens in range(1, 9000)]
    for tokens, padded in enumerate(numbers, start=1):
        assert tokens <= padded <= max(tokens, 1.25 * tokens)
    assert {found for found in numbers if 2048 <= found <= 8192} == {
        *(2048, 2560, 3072, 3584, 4096, 5120, 6144, 7168, 8192)
    }
    for tokens, experts, alignment in ((1, 1, 128), (3, 7, 16), (100, 5, 64), (1000, 3, 128)):
        for ids in (random_ids(tokens, experts, 1, DEVICE), torch.zeros(tokens, 1, dtype=torch.int32)):
            counts = torch.bincount(ids.flatten(), minlength=experts)
            padded_rows = int(((counts + alignment - 1) // alignment * alignment).sum())
            rows = rows_for(tokens, 1, experts, alignment)
            assert padded_rows <= rows and rows % alignment == 0


def test_ways_name_every_number_of_rows() -> None:
    offer()
    _, w13, _, _, _, s13, _ = case(random_ids(1, EXPERTS, 2, DEVICE)).tensors
    found: dict[Any, tuple[int, int]] = ways.ways_up_to(100, 2, 2, w13, s13, True)
    assert {way.plan.rows for way in found} == {rows_for(tokens, 2, EXPERTS, 16) for tokens in range(1, 101)}
    assert all(way.plan.rows >= rows_for(last, 2, EXPERTS, 16) for way, (_, last) in found.items())
