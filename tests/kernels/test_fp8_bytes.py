"""FP8 weights on GPUs without FP8 conversions: read as bytes and widened in the kernels, activations kept."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
import triton
import triton.language as tl

from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.gemm import policy
from qwen3next_plugin.kernels.gemm.triton import decode_e4m3
from qwen3next_plugin.kernels.gpus import Target
from tests.helpers import nan_like

from .common import DTYPES, assert_close, assert_repeatable, tolerance
from .moe_case import problem, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory", "as_bytes")
FINITE = [code for code in range(256) if code & 0x7F != 0x7F]


@pytest.fixture
def as_bytes(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[torch.device]]:
    """Kernels are given weights as on an A100, on whatever runs them here; the devices asked about."""
    seen: list[torch.device] = []

    def decodes(device: torch.device) -> bool:
        seen.append(device)
        return True

    monkeypatch.setattr(policy, "decodes_weights", decodes)
    yield seen


def values(codes: torch.Tensor) -> torch.Tensor:
    return codes.view(gemm.FP8).to(torch.float32)


@triton.jit
def _decode_kernel(codes_ptr, out_ptr, N: tl.constexpr):  # type: ignore[no-untyped-def]
    places = tl.arange(0, N)
    tl.store(out_ptr + places, decode_e4m3(tl.load(codes_ptr + places)))


def test_every_code_has_torchs_value(device: str) -> None:
    codes = torch.arange(256, dtype=torch.uint8, device=device)
    found = nan_like(256, dtype=torch.float32, device=device)
    _decode_kernel[(1,)](codes, found, N=256)
    expected = values(codes)
    assert torch.equal(found.isnan(), expected.isnan()) and found.isnan().nonzero().flatten().tolist() == [0x7F, 0xFF]
    finite = torch.tensor(FINITE, device=device)
    assert torch.equal(found[finite].view(torch.int32), expected[finite].view(torch.int32))  # -0.0 too


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_finite_code_passes_a_product_unchanged(dtype: torch.dtype, as_bytes: list, device: str) -> None:
    weight = torch.zeros(len(FINITE), 40, dtype=torch.uint8, device=device)
    weight[:, 33] = torch.tensor(FINITE, dtype=torch.uint8, device=device)
    x = torch.zeros(3, 40, dtype=dtype, device=device)
    x[1, 33] = 1.0
    scale = torch.ones(2, 1, device=device)
    found = gemm.block_fp8_matmul(x, weight.view(gemm.FP8), scale, backend="triton")
    assert as_bytes
    assert torch.equal(found[1].float(), values(weight[:, 33]))
    assert not found[::2].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(0, 128, 128), (1, 200, 300), (17, 40, 70), (65, 96, 128)])
def test_products_against_float64(sizes: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    M, N, K = sizes
    x = torch.randn(M, K + 2, device=device).to(dtype)[:, 1:-1]
    for block in ((128, 128), (32, 64)):
        weight, scale = gemm.quantize_block(torch.randn(N, K, device=device), block)
        expected = x.double() @ gemm.dequantize_block(weight, scale, torch.float64).T
        limit = tolerance(dtype, 2, "triton", device)
        # Said here, since the GPU that pretends to have no FP8 units may have some.
        options = {"quantize_activations": False, "backend": "triton"}
        assert_close(gemm.block_fp8_matmul(x, weight, scale, **options), expected, limit)
        assert_repeatable(lambda w=weight, s=scale, o=options: gemm.block_fp8_matmul(x, w, s, **o))


@pytest.mark.parametrize("tokens", [0, 1, 17])
@pytest.mark.parametrize(
    ("routing", "inner", "inner_block", "dtype"),
    [
        ("random", 144, 128, torch.bfloat16),
        ("one expert", 64, 64, torch.float16),
        ("some skipped", 96, 32, torch.float32),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # numpy rounds rows that no pair uses
def test_experts_against_float64(
    routing: str, inner: int, inner_block: int, dtype: torch.dtype, tokens: int, as_bytes: list, device: str
) -> None:
    ids = random_ids(tokens, 5, 2, device)
    if routing == "one expert":
        ids[:] = torch.tensor([3, -1], dtype=torch.int32)
    elif routing == "some skipped":
        ids[torch.rand(ids.shape, device=device) < 0.4] = -1
    case = problem(ids, 5, 160, inner, "fp8", dtype, inner_block=inner_block)
    assert_close(case.run("triton"), case.expected(), case.limit("triton", device))
    assert_repeatable(case.run, "triton")
    assert bool(as_bytes) == (tokens > 0)


def test_bytes_and_codes_give_the_same(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    case = problem(random_ids(9, 4, 2, device), 4, 160, 64, "fp8")
    widened = case.run("triton")
    monkeypatch.setattr(policy, "decodes_weights", lambda device: False)
    torch.testing.assert_close(widened, case.run("triton"), rtol=0 if device == "cpu" else 1e-6, atol=0)


def test_a_nan_code_reaches_only_the_tokens_of_its_expert(device: str) -> None:
    ids = torch.tensor([[0, 1], [1, 2], [0, 2]], dtype=torch.int32, device=device)
    case = problem(ids, 3, 32, 64, "fp8")
    case.tensors[1].view(torch.uint8)[1, 5, 7] = 0xFF
    assert case.run("triton").isnan().any(dim=1).tolist() == [True, True, False]


@pytest.mark.parametrize(
    ("capability", "widens", "rounds"), [((8, 0), True, False), ((8, 6), True, False), ((8, 9), False, True)]
)
def test_who_converts_is_decided_by_the_capability(
    capability: tuple[int, int], widens: bool, rounds: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    policy.has_fp8_units.cache_clear()
    gpu = torch.device("cuda", 0)
    try:
        assert policy.decodes_weights(gpu) is widens
        assert policy.quantizes_activations(10_000, gpu) is rounds
        assert (len(policy.fp8_choices(Target("Some GPU", capability))) == 1) is widens
        if rounds:
            policy.require_fp8_units(gpu)
        else:
            with pytest.raises(ValueError, match=r"8\.9 or later; Some GPU has 8\..*leave quantize_activations out"):
                policy.require_fp8_units(gpu)
    finally:
        policy.has_fp8_units.cache_clear()
    policy.require_fp8_units(torch.device("cpu"))
    assert not policy.decodes_weights(torch.device("cpu"))


def test_a_gpu_without_bf16_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    weight = SimpleNamespace(device=torch.device("cuda", 0), is_cuda=True)
    with pytest.raises(ValueError, match=r"FP8 weights need .* 8\.0 or later; Some GPU has 7\.5: use the bf16"):
        policy.weight_codes(weight)  # type: ignore[arg-type]


def test_rounded_activations_are_not_asked_of_the_bytes(device: str) -> None:
    """The default keeps them: a few tokens are not rounded."""
    case = problem(random_ids(2, 3, 2, device), 3, 32, 64, "fp8")
    default = moe.fused_moe(*case.tensors, backend="triton")
    assert torch.equal(default, case.run("triton"))
