"""The mixture of experts against float64: dtypes, FP8, shards, every kind of routing."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import moe
from qwen3next_plugin.kernels.moe import ways
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile, forced

from .common import (
    DTYPES,
    FP8_CHECKS,
    assert_close,
    assert_compiles,
    assert_repeatable,
    to64,
)
from .moe_case import Problem, problem, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")
WEIGHTS = ("float", "fp8", "fp8 activations")
WAYS = ("reference", "sorted", "few")
"""Backends, and of Triton's both ways: few tokens need not be sorted by expert."""


@pytest.fixture(params=WAYS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "reference":
        return "reference"
    monkeypatch.setattr(ways, "MAX_TOKENS", 0 if request.param == "sorted" else 1 << 30)
    return "triton"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner"),
    [(1, 4, 2, 64, 64), (7, 4, 4, 40, 24), (33, 3, 1, 136, 32), (3, 2, 2, 160, 144), (6, 1, 1, 32, 16)],
)
def test_against_float64(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, weights: str, dtype: torch.dtype, backend: str,
    device: str,
) -> None:  # fmt: skip
    case = problem(random_ids(tokens, experts, top_k, device), experts, hidden, inner, weights, dtype)
    assert_close(case.run(backend), case.expected(), case.limit(backend, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("routing", ["random", "some skipped"])
def test_wide_tiles_round_what_they_activated(routing: str, dtype: torch.dtype, device: str) -> None:
    """A tile of gate and up that is one group wide hands over FP8; a narrower one leaves the rounding to a launch."""
    ids = random_ids(21, 4, 2, device)
    if routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.3] = -1
    case = problem(ids, 4, 136, 256, "fp8 activations", dtype)
    found = []
    for columns in (128, 64):
        with forced(MoeConfig(16, Tile(columns, 64, 4, 2), Tile(64, 64, 4, 2))):
            found.append(case.run("triton"))
            assert_close(found[-1], case.expected(), case.limit("triton", device))
    assert dtype is torch.float32 or not torch.equal(*found), "both rounded to the tokens' dtype in between"


def test_reference_is_the_plain_sum(device: str) -> None:
    """The oracle of this file, written out token by token."""
    case = problem(random_ids(5, 6, 3, device), 6, 20, 12)
    x, w13, w2, router, ids, *_ = to64(case.tensors)
    expected = torch.zeros_like(x)
    for m in range(5):
        for k in range(3):
            gate, up = (w13[ids[m, k]] @ x[m]).chunk(2)
            expected[m] += router[m, k] * (w2[ids[m, k]] @ (gate * torch.sigmoid(gate) * up))
    assert_close(case.run("reference"), expected, 1e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("routing", ["one expert", "two of many", "some skipped", "all skipped", "int64"])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy rounds rows that no pair uses
def test_routings(routing: str, weights: str, backend: str, device: str) -> None:
    experts, top_k = 5, 2
    ids = random_ids(20, experts, top_k, device)
    if routing == "one expert":
        ids.fill_(3)
    elif routing == "two of many":
        ids[:, 0], ids[:, 1] = 4, 1
    elif routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.4] = -1
        ids[2] = -1
    elif routing == "all skipped":
        ids.fill_(-1)
    else:
        ids = ids.long()
    case = problem(ids, experts, 48, 32, weights)
    actual = case.run(backend)
    assert_close(actual, case.expected(), case.limit(backend, device))
    assert not actual[(ids < 0).all(dim=1)].any()


def test_triton_skips_ids_past_the_last_expert(device: str) -> None:
    """The host never sees the ids there, so a bad one must not be followed into memory."""
    ids = random_ids(9, 4, 2, device)
    ids[3], ids[5, 0] = 4, 1_000_000
    case = problem(ids, 4, 32, 32)
    assert_close(case.run("triton"), case.expected(), 3e-6)


@pytest.mark.parametrize("weights", WEIGHTS)
def test_no_tokens(weights: str, backend: str, device: str) -> None:
    case = problem(torch.empty(0, 3, dtype=torch.int32, device=device), 4, 32, 16, weights)
    assert list(case.run(backend).shape) == [0, 32]


def test_tensor_parallel_shards_add_up(backend: str, device: str) -> None:
    """Two ranks with half of I each, their FP8 blocks cut finer as the shard's scales say, sum to the whole."""
    whole = problem(random_ids(6, 3, 2, device), 3, 40, 64, "fp8", block=32)
    x, w13, w2, router, ids, s13, s2 = whole.tensors
    parts = []
    for rank in range(2):
        rows, block = slice(32 * rank, 32 * rank + 32), slice(rank, rank + 1)
        part13 = w13.unflatten(1, (2, -1))[:, :, rows].flatten(1, 2)
        scale13 = s13.unflatten(1, (2, -1))[:, :, block].flatten(1, 2)
        part2 = w2[:, :, rows].contiguous()
        scales = (scale13, s2[:, :, block])
        part = moe.fused_moe(x, part13, part2, router, ids, *scales, quantize_activations=False, backend=backend)
        parts.append(part)
    assert_close(parts[0] + parts[1], whole.expected(), 1e-6)


@pytest.mark.parametrize("weights", ["fp8", "fp8 activations"])
@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(("inner", "inner_block"), [(64, 64), (192, 64)])
@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy rounds rows that no pair uses
def test_slices_of_part_of_a_block(
    inner: int, inner_block: int, tokens: int, weights: str, backend: str, device: str
) -> None:
    """As ranks hold them that cut 128-blocks: I = 512 over eight is 64; every token to expert 2, which has company."""
    ids = random_ids(tokens, 4, 2, device)
    ids[:, 0], ids[:, 1] = 2, torch.where(ids[:, 1] == 2, -1, ids[:, 1])
    case = problem(ids, 4, 160, inner, weights, torch.bfloat16, inner_block=inner_block)
    assert list(case.tensors[5].shape) == [4, 2 * inner // inner_block, 2]
    assert list(case.tensors[6].shape) == [4, 2, inner // inner_block]
    assert_close(case.run(backend), case.expected(), case.limit(backend, device))


@pytest.mark.parametrize("weights", ["float", "fp8"])
@pytest.mark.parametrize("tokens", [1, 5])
def test_a_shared_expert_is_the_last_choice(tokens: int, weights: str, backend: str, device: str) -> None:
    """Routing, routed and shared expert as served, against the shared expert computed and added apart."""
    logits = torch.randn(tokens, 4, device=device)
    gate = torch.randn(1, 64, device=device) / 8
    case = problem(torch.zeros(tokens, 3, dtype=torch.int32, device=device), 5, 64, 32, weights)
    x, w13, w2, _, _, s13, s2 = case.tensors
    choices, ids = moe.route(logits, 2, True, x, gate, backend=backend)
    options = {"quantize_activations": False, "num_shared": 1, "backend": backend}
    actual = moe.fused_moe(x, w13, w2, choices, ids, s13, s2, **options)
    routed = Problem((x, w13, w2, *moe.reference.route(logits, 2, True), s13, s2), False).expected()
    alone = torch.full((tokens, 1), 4, device=device)
    shared = Problem((x, w13, w2, torch.ones(tokens, 1, device=device), alone, s13, s2), False).expected()
    assert_close(actual, moe.reference.add_shared_expert(routed, shared, x.double(), gate.double()), 3e-6)


def test_expert_parallel_ranks_add_up(backend: str, device: str) -> None:
    ids = random_ids(8, 6, 3, device)
    whole = problem(ids, 6, 32, 24)
    x, w13, w2, router, *_ = whole.tensors
    total = torch.zeros_like(x)
    for first in (0, 3):
        local = torch.where((ids >= first) & (ids < first + 3), ids - first, -1)
        part = slice(first, first + 3)
        total += moe.fused_moe(x, w13[part], w2[part], router, local, backend=backend)
    assert_close(total, whole.expected(), 3e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("routing", ["random", "one expert", "some skipped"])
def test_tiles_apart_change_no_bit(
    routing: str, weights: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    """Where every pair may begin a tile nothing is sorted, and tokens are rounded on the way: the sorted way's bits."""
    monkeypatch.setattr(ways, "MAX_TOKENS", 0)
    ids = random_ids(9, 20, 2, device)
    if routing == "one expert":
        ids.fill_(3)  # two tiles of it
    elif routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.3] = -1
    case = problem(ids, 20, 136, 48, weights, dtype)
    assert ways.choose_way(9, 2, 4, *(case.tensors[place] for place in (1, 5)), case.rounded, 0).apart
    apart = case.run("triton")
    monkeypatch.setattr(ways, "apart", lambda *_: False)
    assert torch.equal(apart, case.run("triton"))
    assert_close(apart, case.expected(), case.limit("triton", device))


def test_rounded_activations_stay_near_the_unrounded(device: str) -> None:
    case = problem(random_ids(8, 3, 2, device), 3, 256, 128, "fp8 activations")
    rounded, plain = case.run("triton"), Problem(case.tensors, False).expected()
    error = float((rounded - plain).norm() / plain.norm())
    assert 1e-3 < error < 0.06  # E4M3 keeps three mantissa bits: about 2.5 % a product


@pytest.mark.parametrize("weights", WEIGHTS)
def test_results_repeat_and_inputs_stay(weights: str, backend: str, device: str) -> None:
    case = problem(random_ids(12, 4, 3, device), 4, 48, 32, weights)
    before = [t.clone() if t is not None else None for t in case.tensors]
    assert_repeatable(case.run, backend)
    for a, b in zip(case.tensors, before, strict=True):
        assert a is None or b is None or torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("backend", ["sorted", "few"], indirect=True)
def test_a_token_does_not_depend_on_its_batch(backend: str, device: str) -> None:
    """Alone, in another place or among others: the same bits, as long as the tile sizes are the same."""
    case = problem(random_ids(11, 4, 2, device), 4, 48, 32)
    x, w13, w2, router, ids, *_ = case.tensors
    together = case.run(backend)
    for m in (0, 7):
        row = slice(m, m + 1)
        alone = moe.fused_moe(x[row], w13, w2, router[row], ids[row], backend=backend)
        assert torch.equal(alone, together[row])


def test_custom_op(device: str) -> None:
    case = problem(random_ids(5, 4, 2, device), 4, 16, 8, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.qwen3next.fused_moe.default, case.tensors)
    assert_compiles(lambda *tensors: moe.fused_moe(*tensors), *case.tensors)
    fp8 = problem(random_ids(5, 4, 2, device), 4, 16, 8, "fp8")
    torch.library.opcheck(torch.ops.qwen3next.fused_moe.default, fp8.tensors, test_utils=FP8_CHECKS)
    assert_compiles(lambda *tensors: moe.fused_moe(*tensors), *fp8.tensors)


@pytest.mark.parametrize(
    ("place", "replacement", "message"),
    [
        (0, torch.ones(5), r"\[M, H\], \[E, 2I, H\] and \[E, H, I\]"),
        (0, torch.ones(5, 32), r"w13 is \[4, 16, 16\].*must be \[E, 16, 32\]"),
        (1, torch.ones(4, 12, 16), r"w13 is \[4, 12, 16\]"),
        (2, torch.ones(3, 16, 8), r"w2 is \[3, 16, 8\]"),
        (3, torch.ones(5, 3), r"topk_weights is \[5, 3\] and topk_ids is \[5, 2\]"),
        (4, torch.ones(4, 2), r"topk_ids is \[4, 2\].*\[5, k\]"),
        (4, torch.ones(5, 2), "topk_ids is torch.float32; it must be int32 or int64"),
        (1, torch.ones(4, 16, 16).half(), "w13 is torch.float16.*must be torch.float32"),
        (5, torch.ones(4, 2, 1), "both w13_scale and w2_scale"),
    ],
)
def test_wrong_arguments(place: int, replacement: torch.Tensor, message: str) -> None:
    tensors: list[Any] = list(problem(random_ids(5, 4, 2, "cpu"), 4, 16, 8).tensors)
    tensors[place] = replacement
    with pytest.raises(ValueError, match=message):
        moe.fused_moe(*tensors)


def test_wrong_scales() -> None:
    x, w13, w2, router, ids, s13, s2 = problem(random_ids(5, 4, 2, "cpu"), 4, 200, 160, "fp8").tensors
    with pytest.raises(ValueError, match=r"w2_scale is \[4, 2, 1\].*must end in \[2, 2\]"):
        moe.fused_moe(x, w13, w2, router, ids, s13, s2[..., :1])
    with pytest.raises(ValueError, match=r"w13_scale is \[4, 3, 2\].*as many row blocks each"):
        moe.fused_moe(x, w13, w2, router, ids, s13[:, 1:], s2)
    with pytest.raises(ValueError, match=r"w13_scale is \[3, 4, 2\]; it must be \[4, "):
        moe.fused_moe(x, w13, w2, router, ids, s13[1:], s2)
    with pytest.raises(ValueError, match="quantize_activations needs FP8 weights"):
        moe.fused_moe(x, w13.float(), w2.float(), router, ids, quantize_activations=True)
