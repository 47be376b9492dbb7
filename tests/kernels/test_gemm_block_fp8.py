"""FP8 block quantisation and products against float64."""

import pytest
import torch

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.gemm import policy
from qwen3next_plugin.kernels.gemm.reference import dequantize_tokens

from .common import BACKENDS, DTYPES, FP8_CHECKS, assert_close, assert_compiles, assert_repeatable, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")


@pytest.mark.parametrize("shape", [(128, 128), (200, 300), (1, 1), (3, 130, 64), (2, 2, 40, 257)])
def test_block_quantisation_keeps_three_mantissa_bits(shape: tuple[int, ...], device: str) -> None:
    weight = torch.randn(*shape, device=device)
    codes, scale = gemm.quantize_block(weight)
    assert codes.dtype is gemm.FP8 and scale.dtype is torch.float32
    assert list(scale.shape) == [*shape[:-2], -(-shape[-2] // 128), -(-shape[-1] // 128)]
    assert float(codes.float().abs().max()) == 448.0
    back = gemm.dequantize_block(codes, scale, torch.float64)
    block_peak = scale.double().amax() * 448
    # half a step of three mantissa bits, or of the smallest step where codes are subnormal
    assert bool(((back - weight.double()).abs() <= weight.double().abs() / 16 + block_peak * 2**-18).all())


def test_block_scales_belong_to_their_block(device: str) -> None:
    weight = torch.ones(200, 300, device=device)
    weight[128:, 256:] = 1000.0
    codes, scale = gemm.quantize_block(weight)
    torch.testing.assert_close(scale, torch.tensor([[1, 1, 1], [1, 1, 1000.0]], device=device) / 448)
    assert_close(gemm.dequantize_block(codes, scale), weight.double(), 1e-6)
    zero_codes, zero_scale = gemm.quantize_block(torch.zeros(4, 4, device=device))
    assert not zero_codes.float().any() and torch.isfinite(zero_scale).all()


def test_block_size_is_read_from_the_shapes() -> None:
    def size(rows: int, cols: int, row_blocks: int, col_blocks: int) -> tuple[int, int]:
        return gemm.block_size(torch.empty(rows, cols), torch.empty(row_blocks, col_blocks))

    assert size(512, 2048, 4, 16) == (128, 128)
    assert size(128, 2048, 2, 16) == (64, 128)
    assert size(64, 100, 2, 2) == (32, 64)
    assert size(7, 7, 1, 1) == (128, 128)
    with pytest.raises(ValueError, match=r"scale_inv is \[3, 16\] for a weight \[512, 2048\].*must end in \[4, 16\]"):
        size(512, 2048, 3, 16)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 128), (5, 300), (3, 7), (0, 64)])
def test_token_quantisation(shape: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    rows, cols = shape
    x = (torch.randn(rows, cols + 4, device=device) * torch.randn(rows, 1, device=device).exp()).to(dtype)[:, 2:-2]
    codes, scale = gemm.quantize_tokens(x, backend=backend)
    assert list(scale.shape) == [rows, -(-cols // 128)]
    expected_codes, expected_scale = gemm.quantize_tokens(x, backend="reference")
    torch.testing.assert_close(scale, expected_scale)
    differing = codes.float() != expected_codes.float()
    assert int(differing.sum()) <= codes.numel() // 200  # a division may end one unit away, on the other code
    back = dequantize_tokens(codes, scale, torch.float64)
    peak = scale.double().repeat_interleave(128, dim=1)[:, :cols] * 448
    assert bool(((back - x.double()).abs() <= x.double().abs() / 15.9 + peak * 2**-18).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_token_quantisation_of_special_rows(backend: str, device: str) -> None:
    """Zeros stay exact under a finite scale; values that round up to a power of two carry; subnormal codes are kept."""
    x = torch.zeros(3, 128, device=device)
    x[1, 0], x[1, 1], x[1, 2] = 448.0, 127.5, -31.5
    x[2, 0], x[2, 1], x[2, 2], x[2, 3] = 448.0, 2.0**-9, 0.016, 2.0**-10
    codes, scale = gemm.quantize_tokens(x, backend=backend)
    assert scale[:, 0].tolist() == [1.0, 1.0, 1.0]
    assert codes.float()[0].tolist() == [0.0] * 128
    assert codes.float()[1, :3].tolist() == [448.0, 128.0, -32.0]
    assert codes.float()[2, :4].tolist() == [448.0, 2.0**-9, 0.015625, 0.0]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
@pytest.mark.parametrize("sizes", [(1, 128, 128), (5, 200, 300), (17, 40, 70), (0, 16, 32)])
def test_matmul(sizes: tuple[int, int, int], rounded: bool, dtype: torch.dtype, backend: str, device: str) -> None:
    M, N, K = sizes
    x = torch.randn(M, K + 2, device=device).to(dtype)[:, 1:-1]
    weight, scale = gemm.quantize_block(torch.randn(N, K, device=device))
    actual = gemm.block_fp8_matmul(x, weight, scale, quantize_activations=rounded, backend=backend)
    values = dequantize_tokens(*gemm.quantize_tokens(x, backend=backend), torch.float64) if rounded else x.double()
    expected = values @ gemm.dequantize_block(weight, scale, torch.float64).T
    # A Hopper's FP8 units keep fewer bits of a sum than float32 does.
    sums = 5e-4 if rounded and device == "cuda" and backend == "triton" else 0.0
    assert_close(actual, expected, max(tolerance(dtype, 2, backend, device), sums))
    assert_repeatable(lambda: gemm.block_fp8_matmul(x, weight, scale, quantize_activations=rounded, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rounded", [False, True])
def test_matmul_with_finer_blocks(rounded: bool, backend: str, device: str) -> None:
    x = torch.randn(3, 128, device=device)
    weight, scale = gemm.quantize_block(torch.randn(96, 128, device=device), (32, 64))
    actual = gemm.block_fp8_matmul(x, weight, scale, quantize_activations=rounded, backend=backend)
    values = dequantize_tokens(*gemm.quantize_tokens(x), torch.float64) if rounded else x.double()
    assert_close(actual, values @ gemm.dequantize_block(weight, scale, torch.float64).T, 2e-6)


def test_custom_ops(device: str) -> None:
    x = torch.randn(4, 140, device=device)
    weight, scale = gemm.quantize_block(torch.randn(24, 140, device=device))
    torch.library.opcheck(torch.ops.qwen3next.quantize_tokens.default, (x,), test_utils=FP8_CHECKS)
    torch.library.opcheck(torch.ops.qwen3next.block_fp8_matmul.default, (x, weight, scale), test_utils=FP8_CHECKS)
    assert_compiles(lambda *t: gemm.block_fp8_matmul(*t), x, weight, scale)
    assert_compiles(lambda t: dequantize_tokens(*gemm.quantize_tokens(t)), x)


def test_activations_are_kept_on_a_cpu_and_for_few_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not policy.quantizes_activations(10_000, torch.device("cpu"))
    monkeypatch.setattr(policy, "has_fp8_units", lambda device: True)
    gpu = torch.device("cuda", 0)
    assert policy.quantizes_activations(policy.MIN_ROWS, gpu)
    assert not policy.quantizes_activations(policy.MIN_ROWS - 1, gpu)


def test_wrong_arguments() -> None:
    weight, scale = gemm.quantize_block(torch.randn(16, 32))
    with pytest.raises(ValueError, match=r"x is \[4, 31\] and weight is \[16, 32\]"):
        gemm.block_fp8_matmul(torch.ones(4, 31), weight, scale)
    with pytest.raises(ValueError, match="weight is torch.float32"):
        gemm.block_fp8_matmul(torch.ones(4, 32), weight.float(), scale)
    with pytest.raises(ValueError, match=r"scale_inv is \[5, 1\]"):
        gemm.block_fp8_matmul(torch.ones(4, 32), weight, scale.expand(5, 1))
    with pytest.raises(ValueError, match=r"x is \[4\]; it must be \[M, K\]"):
        gemm.quantize_tokens(torch.ones(4))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rounded", [False, True])
def test_real_sizes(rounded: bool, dtype: torch.dtype) -> None:
    weight, scale = gemm.quantize_block(torch.randn(2048, 4096, device="cuda"))
    full = gemm.dequantize_block(weight, scale, torch.float64)
    for rows in (1, 7, 64, 1024):
        x = torch.randn(rows, 4096, device="cuda").to(dtype)
        values = dequantize_tokens(*gemm.quantize_tokens(x), torch.float64) if rounded else x.double()
        actual = gemm.block_fp8_matmul(x, weight, scale, quantize_activations=rounded)
        # FP8 tensor cores of Hopper keep about 14 bits while summing 128 products
        assert_close(actual, values @ full.T, max(tolerance(dtype, 2), 5e-4 if rounded else 0))
