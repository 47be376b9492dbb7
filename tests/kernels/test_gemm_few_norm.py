"""Products of a norm in one launch, against the norm and the products in float64."""

import pytest
import torch

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.gemm import triton_few
from qwen3next_plugin.kernels.gemm.triton_few import Norm, Tile
from qwen3next_plugin.kernels.norm import add_rms_norm, rms_norm

from .common import BACKENDS, DTYPES, FP8_CHECKS, assert_close, assert_compiles, assert_repeatable, tolerance
from .test_gemm_few import Weight, product, rows_of, stored

pytestmark = pytest.mark.usefixtures("poisoned_memory")
EPS = 1e-6


def expected(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, *weights: Weight
) -> list[torch.Tensor]:
    """The products, the sum (where there is one) and the norm, of inputs rounded where a launch would store them."""
    total = x if residual is None else x + residual
    exact = total.double()
    y = exact * torch.rsqrt(exact.square().mean(dim=-1, keepdim=True) + EPS) * (1 + weight.double())
    rounded = y.to(x.dtype)
    return [*(product(rounded, *one) for one in weights), *([] if residual is None else [exact]), y]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("sizes", [(1, 33, 1024), (2, 6, 300), (1, 9, 7), (3, 5, 64), (16, 33, 300), (1, 5, 5000)])
def test_a_norm_and_its_product(
    sizes: tuple[int, int, int],
    block: tuple[int, int] | None,
    added: bool,
    dtype: torch.dtype,
    backend: str,
    device: str,
) -> None:
    """One row in one launch; more rows, and rows that no program holds whole, in two."""
    M, N, K = sizes
    x, weight = rows_of(M, K, dtype, device), stored(N, K, dtype, block, device)
    residual, norm_weight = rows_of(M, K, dtype, device) if added else None, torch.randn(K, device=device).to(dtype)
    actual = gemm.few_matmul_of_norm(x, residual, norm_weight, EPS, *weight, keep=True, backend=backend)
    assert all(out.dtype is dtype and out.is_contiguous() for out in actual)
    wanted = expected(x, residual, norm_weight, weight)
    assert_close(tuple(actual), tuple(wanted), tolerance(dtype, 2, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 2, 3])
@pytest.mark.parametrize("keep", [False, True])
def test_two_weights_behind_a_norm(keep: bool, M: int, backend: str, device: str) -> None:
    dtype, K = torch.bfloat16, 320
    x, residual = rows_of(M, K, dtype, device), rows_of(M, K, dtype, device)
    first, second = stored(300, K, dtype, (128, 128), device), stored(5, K, dtype, None, device)
    norm_weight = torch.randn(K, device=device).to(dtype)
    actual = gemm.few_matmul_of_norm(x, residual, norm_weight, EPS, *first, *second, keep=keep, backend=backend)
    wanted = expected(x, residual, norm_weight, first, second)
    assert_close(tuple(actual), tuple(wanted if keep else wanted[:-1]), tolerance(dtype, 2, backend, device))


@pytest.mark.parametrize("rows", [1, 4, 16])
def test_programs_of_more_rows(rows: int, device: str) -> None:
    """Each norms x by itself, and one of them stores; no weight is a multiple of a program's rows."""
    x, norm_weight = torch.randn(1, 700, device=device), torch.randn(700, device=device)
    weights = stored(50, 700, torch.float32, (128, 128), device), stored(23, 700, torch.float32, None, device)
    for first, second in (weights, weights[::-1]):
        tiles = (Tile(True, rows, 1024, 2),) * 2
        norm = Norm(norm_weight, EPS, x.flip(1), keeps=True)
        actual = triton_few.few_matmul_of_norm(x, norm, *first, second, tiles)
        assert_close(actual, tuple(expected(x, x.flip(1), norm_weight, first, second)), 1e-6)


def test_which_launches_there_are(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The norm has its own where there are more rows, where one is too long, and where nothing is multiplied."""
    apart: list[int] = []

    def noted(self: Norm, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        apart.append(x.shape[0])
        return rms_norm(x, self.weight, EPS), x

    monkeypatch.setattr(Norm, "apart", noted)
    for M, N, K, own in (
        (1, 8, 2048, False),
        (2, 8, 2048, True),
        (1, 8, 2049, True),
        (1, 0, 64, True),
        (0, 8, 64, True),
    ):
        x, weight = torch.ones(M, K, device=device, dtype=torch.bfloat16), torch.ones(K, device=device)
        out = gemm.few_matmul_of_norm(
            x, None, weight, EPS, torch.ones(N, K, device=device).bfloat16(), backend="triton"
        )
        assert out[0].shape == (M, N) and apart == ([M] if own else [])
        apart.clear()


def test_equal_inputs_give_equal_bits_and_those_of_two_launches(device: str) -> None:
    x, weight = torch.randn(1, 256, device=device), stored(24, 256, torch.float32, (128, 128), device)
    ones = torch.ones(256, device=device)
    assert_repeatable(gemm.few_matmul_of_norm, x, x.flip(1), ones, EPS, *weight, keep=True, backend="triton")
    y, total = add_rms_norm(x, x.flip(1), ones, EPS, backend="triton")
    found = gemm.few_matmul_of_norm(x, x.flip(1), ones, EPS, *weight, keep=True, backend="triton")
    assert torch.equal(found[1], total)
    assert_close(found[2], y.double(), 1e-6)
    assert_close(found[0], gemm.few_matmul(y, *weight, backend="triton").double(), 1e-6)


def test_it_compiles(device: str) -> None:
    x, first = torch.randn(2, 64, device=device), stored(24, 64, torch.float32, (128, 128), device)
    second, ones = stored(7, 64, torch.float32, None, device), torch.ones(64, device=device)
    assert_compiles(gemm.few_matmul_of_norm, x, x, ones, EPS, *first, *second)
    operation = torch.ops.qwen3next.few_matmul_of_norm.default
    torch.library.opcheck(operation, (x, None, ones, EPS, *second))
    torch.library.opcheck(operation, (x, x, ones, EPS, *first, *second), {"keep": True}, test_utils=FP8_CHECKS)


def test_what_does_not_fit_is_said(device: str) -> None:
    x, plain, ones = (torch.ones(*shape, device=device) for shape in ((3, 256), (200, 256), (256,)))
    for message, arguments in {
        r"norm_weight is \[255\] and x is \[3, 256\]; norm_weight must be \[256\]": (x, None, ones[1:], EPS, plain),
        r"residual is torch.float32 \[2, 256\]; it must be as x": (x, x[:2], ones, EPS, plain),
        "residual is torch.float16": (x, x.half(), ones, EPS, plain),
        "few_matmul_of_norm: second is torch.float16 without factors": (x, x, ones, EPS, plain, None, plain.half()),
        "x has 17 rows; it takes at most 16": (x[:1].expand(17, -1), None, ones, EPS, plain),
    }.items():
        with pytest.raises(ValueError, match=message):
            gemm.few_matmul_of_norm(*arguments)
