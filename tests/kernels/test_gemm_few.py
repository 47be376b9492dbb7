"""Products of a few rows with weights as they are stored, against float64."""

from types import SimpleNamespace

import pytest
import torch

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.gemm import policy, triton_few
from qwen3next_plugin.kernels.gemm.triton_few import Tile

from .common import BACKENDS, DTYPES, FP8_CHECKS, assert_close, assert_compiles, assert_repeatable, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")

Weight = tuple[torch.Tensor, torch.Tensor | None]


def stored(rows: int, columns: int, dtype: torch.dtype, block: tuple[int, int] | None, device: str) -> Weight:
    weight = torch.randn(rows, columns, device=device)
    return (weight.to(dtype), None) if block is None else gemm.quantize_block(weight, block)


def product(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor | None) -> torch.Tensor:
    values = weight.double() if scale is None else gemm.dequantize_block(weight, scale, torch.float64)
    return x.double() @ values.T


def rows_of(M: int, K: int, dtype: torch.dtype, device: str) -> torch.Tensor:
    """Strided: columns of a wider tensor, which holds NaN beside them."""
    wide = torch.full((M, K + 32), float("nan"), device=device).to(dtype)
    wide[:, 16:-16] = torch.randn(M, K, device=device).to(dtype)
    return wide[:, 16:-16]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block", [None, (128, 128)])
@pytest.mark.parametrize("sizes", [(1, 33, 1024), (2, 6, 300), (3, 5, 64), (4, 9, 7), (5, 40, 512), (16, 33, 300)])
def test_a_product(
    sizes: tuple[int, int, int], block: tuple[int, int] | None, dtype: torch.dtype, backend: str, device: str
) -> None:
    M, N, K = sizes
    x, (weight, scale) = rows_of(M, K, dtype, device), stored(N, K, dtype, block, device)
    actual = gemm.few_matmul(x, weight, scale, backend=backend)
    assert actual.dtype is dtype and actual.is_contiguous()
    assert_close(actual, product(x, weight, scale), tolerance(dtype, 1, backend, device))


@pytest.mark.parametrize("rows", range(1, gemm.MAX_ROWS + 1))
def test_every_number_of_rows_and_each_row_by_itself(rows: int, device: str) -> None:
    """Also that a row's product does not depend on what the others hold, which NaN would show."""
    x, (weight, scale) = torch.randn(rows, 256, device=device), stored(6, 256, torch.float32, (128, 128), device)
    x[rows // 2 + 1 :] = float("nan")
    actual = gemm.few_matmul(x, weight, scale, backend="triton")
    clean = slice(0, rows // 2 + 1)
    assert_close(actual[clean], product(x[clean], weight, scale), 1e-6)
    assert bool(actual[rows // 2 + 1 :].isnan().all())


@pytest.mark.parametrize("M", [2, 7])
@pytest.mark.parametrize(("sizes", "block"), [((64, 320), (64, 128)), ((128, 160), (64, 64)), ((70, 130), (32, 16))])
def test_factors_of_smaller_blocks_in_any_layout(
    sizes: tuple[int, int], block: tuple[int, int], M: int, device: str
) -> None:
    x, (weight, scale) = torch.randn(M, sizes[1], device=device), stored(*sizes, torch.float32, block, device)
    assert scale is not None
    scale *= torch.rand_like(scale) + 0.1
    expected = product(x, weight, scale)
    tiles = (Tile(M < 5, 16, 512, 1),) * 2
    for layout in (scale, scale.T.contiguous().T):
        assert_close(triton_few.few_matmul(x, weight, layout, tiles=tiles)[0], expected, 1e-6)
        assert_close(gemm.few_matmul(x, weight, layout, backend="reference"), expected, 1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("M", [1, 3, 6])
@pytest.mark.parametrize("blocks", [((128, 128), None), (None, None), (None, (128, 128))])
def test_two_weights(
    blocks: tuple[tuple[int, int] | None, tuple[int, int] | None], M: int, backend: str, device: str
) -> None:
    """The second has other sizes, and its tail meets the first's programs nowhere."""
    dtype = torch.float16
    x = rows_of(M, 320, dtype, device)
    first, second = stored(37, 320, dtype, blocks[0], device), stored(5, 320, dtype, blocks[1], device)
    actual = gemm.few_matmul_pair(x, *first, *second, backend=backend)
    assert_close(actual, (product(x, *first), product(x, *second)), tolerance(dtype, 1, backend, device))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 4, 5])
def test_behind_a_gate(M: int, dtype: torch.dtype, backend: str, device: str) -> None:
    x, gate = rows_of(M, 300, dtype, device), torch.randn(M, 300, device=device).to(dtype)
    weight, scale = stored(20, 300, dtype, (128, 128), device)
    actual = gemm.few_matmul(x, weight, scale, gate, backend=backend)
    expected = product(x.double() * torch.sigmoid(gate.double()), weight, scale)
    assert_close(actual, expected, tolerance(dtype, 2, backend, device))


@pytest.mark.parametrize("tile", [Tile(True, 1, 1024, 2), Tile(True, 8, 512, 4), Tile(False, 32, 256, 4, 2)])
def test_other_tiles_for_measuring(tile: Tile, device: str) -> None:
    """Vectors with more rows than a program holds included."""
    x, (weight, scale) = torch.randn(6, 700, device=device), stored(50, 700, torch.float32, (128, 128), device)
    (actual,) = triton_few.few_matmul(x, weight, scale, tiles=(tile, tile))
    assert_close(actual, product(x, weight, scale), 1e-6)


def test_weights_as_bytes(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """What GPUs without FP8 units read; NaN codes stay NaN."""
    weight, scale = stored(20, 256, torch.float32, (128, 128), device)
    weight.view(torch.uint8)[3, 200] = 0x7F
    monkeypatch.setattr(policy, "decodes_weights", lambda device: True)
    for M in (2, 8):
        x = torch.randn(M, 256, device=device)
        actual, expected = gemm.few_matmul(x, weight, scale, backend="triton"), product(x, weight, scale)
        assert bool(actual[:, 3].isnan().all())
        actual[:, 3] = expected[:, 3] = 0.0
        assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("shape", [(0, 8, 32), (2, 0, 32)])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do(shape: tuple[int, int, int], backend: str, device: str) -> None:
    M, N, K = shape
    out = gemm.few_matmul(torch.ones(M, K, device=device), torch.ones(N, K, device=device), backend=backend)
    assert out.shape == (M, N)


def test_equal_inputs_give_equal_bits(device: str) -> None:
    for M in (3, 9):
        x, (weight, scale) = torch.randn(M, 256, device=device), stored(24, 256, torch.float32, (128, 128), device)
        assert_repeatable(gemm.few_matmul, x, weight, scale, backend="triton")


def test_both_compile(device: str) -> None:
    x, first = torch.randn(5, 64, device=device), stored(24, 64, torch.float32, (128, 128), device)
    second = stored(7, 64, torch.float32, None, device)
    assert_compiles(gemm.few_matmul, x, *first)
    assert_compiles(gemm.few_matmul_pair, x, *first, *second)
    torch.library.opcheck(torch.ops.qwen3next.few_matmul.default, (x, *second, x))
    torch.library.opcheck(torch.ops.qwen3next.few_matmul_pair.default, (x, *first, *second), test_utils=FP8_CHECKS)


def test_what_does_not_fit_is_said(device: str) -> None:
    x, plain = torch.randn(3, 256, device=device), torch.randn(200, 256, device=device)
    codes, scale = gemm.quantize_block(plain)
    for message, arguments in {
        r"x is \[3, 256\] and weight is \[200, 255\].*\[M, K\] and \[N, K\]": (x, plain[:, 1:]),
        "x has 17 rows; it takes at most 16": (x[:1].expand(17, -1), plain),
        "x is torch.float64; it must be torch.float32": (x.double(), plain),
        "weight is torch.float32 with factors; it must be torch.float8_e4m3fn": (x, plain, scale),
        "weight is torch.float8_e4m3fn without factors; it must be torch.float32": (x, codes),
        r"factors of weight \[200, 256\] are torch.float32 \[3, 2\]": (x, codes, torch.ones(3, 2, device=device)),
        r"factors of weight \[200, 256\] are torch.float32 \[200, 1\]": (x, codes, torch.ones(200, 1, device=device)),
        "factors of weight .* are torch.int32": (x, codes, scale.int()),
        r"gate is torch.float32 \[2, 256\]; it must be as x": (x, plain, None, x[:2]),
    }.items():
        with pytest.raises(ValueError, match=message):
            gemm.few_matmul(*arguments)
    with pytest.raises(ValueError, match="few_matmul_pair: second is torch.float16 without factors"):
        gemm.few_matmul_pair(x, codes, scale, plain.half(), None)


def test_which_weights_fit(device: str) -> None:
    """As an engine may have left them: only [N, K] whose rows are contiguous, as x or FP8 with its blocks' factors."""
    x, plain = torch.randn(30, 256, device=device), torch.randn(200, 256, device=device)
    codes, scale = gemm.quantize_block(plain)
    assert gemm.fits_few(x, plain, None) and gemm.fits_few(x, codes, scale)
    turned = torch.randn(256, 256, device=device).T
    for weight, factors in (
        (plain.half(), None),
        (plain[:, :128], None),
        (turned, None),
        (codes.view(torch.uint8), scale),
        (codes, None),
        (codes, scale.int()),
        (codes, scale[:1]),
        (codes, torch.ones(200, 1, device=device)),
        (codes, torch.tensor(1.0, device=device)),
        (plain, scale),
    ):
        assert not gemm.fits_few(x, weight, factors)
    assert not gemm.fits_few(x[0], plain, None) and not gemm.fits_few(x.double(), plain.double(), None)


def test_the_engine_takes_rows_whose_tiles_leave_most_of_a_round_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide FP8 weights alone, from nine rows on; two rows of them are matrix products, of other weights vectors."""
    monkeypatch.setattr(gemm.few, "has_fp8_units", lambda device: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(multi_processor_count=132))

    def weight(rows: int, dtype: torch.dtype = gemm.FP8) -> torch.Tensor:
        return torch.empty(rows, 2048, dtype=dtype, device="meta")

    taken = {rows: [gemm.runs_few(x, weight(rows)) for x in (1, 8, 9, 16, 17)] for rows in (2048, 9216, 12288)}
    assert taken[2048] == taken[12288] == [True, True, True, True, False]
    assert taken[9216] == [True, True, False, False, False]
    assert gemm.runs_few(16, weight(9216, torch.bfloat16)) and not gemm.runs_few(17, weight(9216, torch.bfloat16))
    shapes = (weight(9216), weight(2048), weight(9216, torch.bfloat16))
    assert [triton_few.tile_of(2, one).vector for one in shapes] == [False, True, True]
    assert all(triton_few.tile_of(1, one).vector for one in shapes)
    first = triton_few.tile_of(2, shapes[0])
    assert not triton_few.tile_of(2, shapes[1], first).vector, "one launch has one kind of product"
