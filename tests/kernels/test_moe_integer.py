"""The mixture of experts with INT4, INT8 and row-scaled FP8 weights against float64 of the dequantised weights."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.moe import config, ways

from .common import BACKENDS, DTYPES, assert_close, assert_compiles, assert_repeatable, to64, tolerance
from .integer_case import FORMATS, Experts, experts_case, limit
from .moe_case import random_ids

pytestmark = [
    pytest.mark.usefixtures("poisoned_memory"),
    pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning"),  # numpy rounds rows that no pair uses
]


def case_of(
    ids: torch.Tensor, experts: int, hidden: int, inner: int, form: str, groups: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Experts:  # fmt: skip
    """INT8 activations need one scale a row, whatever the groups of the others."""
    groups = (hidden, inner) if form == "int8 activations" else groups
    return experts_case(ids, experts, hidden, inner, form, groups, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize(
    ("tokens", "experts", "top_k", "hidden", "inner", "groups", "dtype"),
    [
        (1, 4, 2, 128, 64, (128, 64), torch.bfloat16),  # one of eight ranks: all of its I shares a scale
        (7, 4, 4, 64, 64, (32, 16), torch.float32),
        (33, 3, 1, 192, 32, (64, 32), torch.float16),
        (5, 2, 2, 48, 48, (16, 48), torch.bfloat16),
        (2, 3, 3, 256, 128, (128, 128), torch.float32),
    ],
)
def test_against_float64(
    tokens: int, experts: int, top_k: int, hidden: int, inner: int, groups: tuple[int, int], dtype: torch.dtype,
    form: str, backend: str, device: str,
) -> None:  # fmt: skip
    case = case_of(random_ids(tokens, experts, top_k, device), experts, hidden, inner, form, groups, dtype)
    assert_close(case.run(backend), case.expected(), limit(dtype, form, backend, device, 3))
    if tokens > 1:
        assert_repeatable(case.run, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("routing", ["one expert", "two of many", "some skipped", "all skipped", "int64"])
def test_routings(routing: str, form: str, backend: str, device: str) -> None:
    experts, top_k = 5, 2
    ids = random_ids(20, experts, top_k, device)
    if routing == "one expert":
        ids[:, 0], ids[:, 1] = 3, -1
    elif routing == "two of many":
        ids[:, 0], ids[:, 1] = 4, 1
    elif routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.4] = -1
        ids[2] = -1
    elif routing == "all skipped":
        ids.fill_(-1)
    else:
        ids = ids.long()
    case = case_of(ids, experts, 64, 32, form, (32, 16))
    actual = case.run(backend)
    assert_close(actual, case.expected(), limit(torch.float32, form, backend, device, 3))
    assert not actual[(ids < 0).all(dim=1)].any()


@pytest.mark.parametrize("form", FORMATS)
def test_numbers_of_tokens(form: str, proof: bool, device: str) -> None:
    """From none to 64; every one of them in a proof."""
    for tokens in range(65) if proof else (0, 1, 16, 64):
        case = case_of(random_ids(tokens, 3, 2, device), 3, 64, 64, form, (32, 64), torch.float16)
        actual = case.run("triton")
        assert list(actual.shape) == [tokens, 64]
        assert_close(actual, case.expected(), limit(torch.float16, form, "triton", device, 3))


@pytest.mark.parametrize("form", ["int4", "int4 zeros", "int8"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_tensor_parallel_shards_add_up(backend: str, form: str, device: str) -> None:
    """Two ranks with half of I each; the second product's groups are cut where a rank's columns end."""
    whole = case_of(random_ids(6, 3, 2, device), 3, 64, 64, form, (64, 32))
    x, w13, w2, router, ids, s13, s2 = whole.tensors
    z13, z2 = whole.zeros["w13_zero"], whole.zeros["w2_zero"]
    per_rank, total = w2.shape[2] // 2, torch.zeros_like(x)
    for rank in range(2):
        rows, block = slice(32 * rank, 32 * rank + 32), slice(rank, rank + 1)
        halves = (None if t is None else t.unflatten(1, (2, -1))[:, :, rows].flatten(1, 2) for t in (w13, s13, z13))
        part13, scale13, zero13 = halves
        part2 = w2[:, :, per_rank * rank : per_rank * (rank + 1)].contiguous()
        zeros = {"w13_zero": zero13, "w2_zero": None if z2 is None else z2[:, :, block]}
        total += moe.fused_moe(x, part13, part2, router, ids, scale13, s2[:, :, block], **zeros, backend=backend)
    assert_close(total, whole.expected(), 3e-6)


@pytest.mark.parametrize("form", FORMATS)
def test_wider_tiles(form: str, device: str) -> None:
    """Tiles deeper than a group, and wider and deeper than the products."""
    tiles = config.MoeConfig(32, config.Tile(128, 256, 4, 2), config.Tile(32, 32, 4, 2))
    case = case_of(random_ids(18, 2, 2, device), 2, 96, 48, form, (32, 16))
    with config.forced(tiles):
        actual = case.run("triton")
    assert_close(actual, case.expected(), limit(torch.float32, form, "triton", device, 3))


@pytest.mark.parametrize("backend", BACKENDS)
def test_mixed_zeros(backend: str, device: str) -> None:
    """Zeros in one of the two products only."""
    case = case_of(random_ids(4, 3, 2, device), 3, 64, 32, "int4 zeros", (32, 32))
    case.zeros["w13_zero"] = None
    assert_close(case.run(backend), case.expected(), 3e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [None, True])
def test_fp8_with_a_factor_a_row(rounded: bool | None, dtype: torch.dtype, backend: str, device: str) -> None:
    ids, experts, hidden, inner = random_ids(9, 3, 2, device), 3, 160, 48
    x = torch.randn(9, hidden, device=device).to(dtype)
    q13, s13 = gemm.quantize_block(torch.randn(experts, 2 * inner, hidden, device=device) / hidden**0.5, (1, hidden))
    q2, s2 = gemm.quantize_block(torch.randn(experts, hidden, inner, device=device) / inner**0.5, (1, inner))
    assert list(s13.shape) == [experts, 2 * inner, 1] and list(s2.shape) == [experts, hidden, 1]
    router = torch.rand(9, 2, device=device)
    w13, w2 = q13.double() * s13.double(), q2.double() * s2.double()
    actual = moe.fused_moe(x, q13, q2, router, ids, s13, s2, quantize_activations=rounded, backend=backend)
    if rounded:
        expected = moe.reference.fused_moe(x.double(), q13, q2, router.double(), ids, s13, s2, True)
        allowed = {torch.float32: 2e-3, torch.float16: 6e-3, torch.bfloat16: 3e-2}[dtype]
    else:
        expected = moe.reference.fused_moe(x.double(), w13, w2, router.double(), ids)
        allowed = tolerance(dtype, 3, backend, device)
    assert_close(actual, expected, allowed)


def test_fp8_rows_and_blocks_do_not_mix() -> None:
    x, router, ids = torch.randn(2, 32), torch.rand(2, 1), random_ids(2, 2, 1, "cpu")
    q13, s13 = gemm.quantize_block(torch.randn(2, 2, 32, 32))
    q2, s2 = gemm.quantize_block(torch.randn(2, 32, 32), (1, 32))
    with pytest.raises(ValueError, match=r"w13_scale is \[2, 2, 1\] and w2_scale is \[2, 32, 1\]; both must hold"):
        moe.fused_moe(x, q13.flatten(1, 2), q2, router, ids, s13.flatten(1, 2), s2)


def test_row_factors_keep_activations_and_blocks_may_not(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    asked: list[torch.device] = []

    def never(device: torch.device) -> bool:
        asked.append(device)
        return False

    monkeypatch.setattr(ways, "has_fp8_units", never)
    monkeypatch.setattr(ways, "MAX_TOKENS", 1)
    x, router, ids = torch.randn(2, 32, device=device), torch.rand(2, 1, device=device), random_ids(2, 2, 1, device)
    q13, s13 = gemm.quantize_block(torch.randn(2, 64, 32, device=device), (1, 32))
    q2, s2 = gemm.quantize_block(torch.randn(2, 32, 32, device=device), (1, 32))
    moe.fused_moe(x, q13, q2, router, ids, s13, s2, backend="triton")
    int8 = case_of(ids, 2, 32, 32, "int8", (32, 32))
    moe.fused_moe(*int8.tensors, backend="triton")
    assert not asked
    halves, s13 = gemm.quantize_block(torch.randn(2, 2, 32, 32, device=device))
    q2, s2 = gemm.quantize_block(torch.randn(2, 32, 32, device=device))
    moe.fused_moe(x, halves.flatten(1, 2), q2, router, ids, s13.flatten(1, 2), s2, backend="triton")
    assert asked == [x.device]


@pytest.mark.parametrize("form", FORMATS)
def test_inputs_stay(form: str, device: str) -> None:
    case = case_of(random_ids(6, 4, 3, device), 4, 64, 32, form, (64, 32))
    every = [t for t in (*case.tensors, *case.zeros.values()) if t is not None]
    before = [t.clone() for t in every]
    case.run("triton")
    assert all(torch.equal(a, b) for a, b in zip(every, before, strict=True))


@pytest.mark.parametrize("form", FORMATS)
def test_custom_op(form: str, device: str) -> None:
    case = case_of(random_ids(5, 4, 2, device), 4, 32, 16, form, (32, 16), torch.bfloat16)
    options = case.zeros | {"quantize_activations": case.rounded}
    torch.library.opcheck(torch.ops.qwen3next.fused_moe.default, case.tensors, options)
    assert_compiles(lambda *tensors: moe.fused_moe(*tensors, **options), *case.tensors)


def test_config_files_are_named_by_the_format() -> None:
    names = [config.weights_name(dtype, size) for dtype in (torch.int8, torch.uint8) for size in (1, 2)]
    assert names == ["int8_w8a8", "int8_w8a16", "int4_w4a16", "int4_w4a16"]
    assert config.weights_name(torch.bfloat16, 2) == "bfloat16"
    assert config.file_name(4, 16, 8, "int4_w4a16") == "E=4,H=16,I=8,dtype=int4_w4a16.json"


def test_wrong_arguments() -> None:
    case = case_of(random_ids(5, 4, 2, "cpu"), 4, 64, 32, "int4 zeros", (32, 32))
    x, w13, w2, router, ids, s13, s2 = case.tensors
    zeros = case.zeros

    def run(*tensors: Any, **options: Any) -> None:
        moe.fused_moe(*tensors, **options)

    with pytest.raises(ValueError, match=r"w13 is \[4, 64, 32\].* two codes a byte; .*\[E, 64, 60\]"):
        run(x[:, :60], w13, w2, router, ids, s13, s2)
    with pytest.raises(ValueError, match="w13 is torch.uint8 and w2 is torch.int8; with scales both must be one of"):
        run(x, w13, w2.repeat(1, 1, 2).view(torch.int8), router, ids, s13, s2)
    with pytest.raises(ValueError, match="w13 is torch.uint8 and w2 is torch.uint8; without scales both must be"):
        run(x, w13, w2, router, ids)
    with pytest.raises(ValueError, match=r"w2_scale is \[4, 64, 3\] for w2 \[4, 64, 16\] \(32 columns of INT4\)"):
        run(x, w13, w2, router, ids, s13, s2.expand(4, 64, 3))
    with pytest.raises(ValueError, match=r"w13_scale is \[4, 64, 8\].*groups of 8"):
        run(x, w13, w2, router, ids, s13.repeat(1, 1, 4), s2)
    with pytest.raises(ValueError, match=r"w13_zero is torch.uint8 \[4, 64, 1\]; it must be uint8 \[4, 64, 2\]"):
        run(x, w13, w2, router, ids, s13, s2, w13_zero=zeros["w13_zero"][..., :1])
    with pytest.raises(ValueError, match="w13_zero and w2_zero belong to INT4"):
        run(x, torch.ones(4, 64, 64), torch.ones(4, 64, 32), router, ids, **zeros)
    with pytest.raises(ValueError, match="w13 is INT4, which takes activations as they are"):
        run(x, w13, w2, router, ids, s13, s2, quantize_activations=True)
    int8 = case_of(ids, 4, 64, 32, "int8", (64, 16)).tensors
    with pytest.raises(ValueError, match=r"w2_scale is \[4, 64, 2\]; INT8 activations need one scale a row of w2"):
        run(*int8, quantize_activations=True)
    with pytest.raises(ValueError, match="w2_zero was given with w2 torch.int8"):
        run(*int8, w2_zero=zeros["w2_zero"])


@pytest.mark.gpu
@pytest.mark.parametrize("inner", [512, 64])
@pytest.mark.parametrize("form", FORMATS)
def test_real_sizes(form: str, inner: int) -> None:
    experts, top_k = 512, 10
    ids = random_ids(1024, experts, top_k, "cuda")
    case = case_of(ids, experts, 2048, inner, form, (128, min(128, inner)), torch.bfloat16)
    x, w13, w2, router, _, s13, s2 = case.tensors
    for tokens in (1, 7, 64, 1024):
        for routed in (ids[:tokens], torch.full_like(ids[:tokens], 7)):
            part = Experts((x[:tokens], w13, w2, router[:tokens], routed, s13, s2), case.zeros, case.rounded)
            # expected() widens every expert's weights at once: the reference with their codes takes them one by one
            tensors = to64((part.tensors[0], *part.tensors[1:3], part.tensors[3]))
            expected = moe.reference.fused_moe(*tensors, routed, s13, s2, case.rounded, **case.zeros)
            assert_close(part.run("triton"), expected, limit(torch.bfloat16, form, "triton", "cuda", 3))
            assert_repeatable(part.run, "triton")
