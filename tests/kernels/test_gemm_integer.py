"""Products with INT4 and INT8 weights against float64 of the dequantised weights."""

import pytest
import torch

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.gemm import integer, policy

from .common import BACKENDS, DTYPES, assert_close, assert_compiles, assert_repeatable
from .integer_case import FORMATS, limit, product

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# M, N, K, group: K itself, groups within a step, groups across steps, a slice of a tensor-parallel rank, odd ones
SIZES = [
    (1, 128, 256, 256),
    (5, 200, 256, 128),
    (17, 40, 192, 64),
    (3, 70, 96, 32),
    (2, 24, 64, 16),
    (33, 16, 144, 48),
    (0, 16, 32, 32),
    (4, 1, 40, 40),
]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("sizes", SIZES)
def test_matmul(sizes: tuple[int, int, int, int], form: str, dtype: torch.dtype, backend: str, device: str) -> None:
    *shape, group = sizes
    case = product(tuple(shape), form, shape[2] if form == "int8 activations" else group, dtype, device)
    assert_close(case.run(backend), case.expected(), limit(dtype, form, backend, device))
    assert_repeatable(case.run, backend)


@pytest.mark.parametrize("form", FORMATS)
def test_many_rows(form: str, proof: bool, device: str) -> None:
    """Every number of rows up to four tiles in a proof."""
    for rows in range(65) if proof else (16, 17, 64):
        case = product((rows, 72, 128), form, 128 if form == "int8 activations" else 32, torch.float16, device)
        assert_close(case.run("triton"), case.expected(), limit(torch.float16, form, "triton", device))


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("scales", DTYPES)
def test_scales_may_have_another_type_than_x(form: str, scales: torch.dtype, device: str) -> None:
    case = product((3, 48, 128), form, 128, torch.bfloat16, device, scales)
    assert case.tensors[2].dtype is scales
    for backend in BACKENDS:
        assert_close(case.run(backend), case.expected(), limit(torch.bfloat16, form, backend, device))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("zero", [None, 0, 7, 15])
def test_every_nibble_passes_unchanged(zero: int | None, dtype: torch.dtype, device: str) -> None:
    """Each code at each of the eight places of a word, times one: exactly code - zero."""
    codes = torch.arange(16, dtype=torch.uint8, device=device)[:, None].expand(16, 64)
    packed, scale = integer.pack_nibbles(codes), torch.ones(16, 1, device=device)
    zeros = None if zero is None else torch.full((16, 1), zero, dtype=torch.uint8, device=device)
    found = gemm.quantized_matmul(torch.eye(64, device=device).to(dtype), packed, scale, zeros, backend="triton")
    expected = codes.T.float() - (8 if zero is None else zero)
    assert torch.equal(found.float(), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_byte_passes_unchanged(dtype: torch.dtype, device: str) -> None:
    codes = torch.arange(-128, 128, device=device).to(torch.int8)[:, None].expand(256, 32).contiguous()
    scale = torch.ones(256, 1, device=device)
    found = gemm.quantized_matmul(torch.eye(32, device=device).to(dtype), codes, scale, backend="triton")
    assert torch.equal(found.float(), codes.T.float())


@pytest.mark.parametrize(("one", "dtype"), [(0x4300, torch.bfloat16), (0x6400, torch.float16)])
def test_what_the_kernel_takes_for_a_codes_bits_is_exact(one: int, dtype: torch.dtype) -> None:
    """The interpreter has no arithmetic in bfloat16, so these constants of the kernel are tried here."""
    codes = torch.arange(16, dtype=torch.int16)
    values = (codes | one).view(dtype)
    offset = {torch.bfloat16: 128.0, torch.float16: 1024.0}[dtype]
    for zero in range(16):
        assert torch.equal(values - torch.tensor(zero + offset).to(dtype), (codes - zero).to(dtype))


def test_weights_that_are_slices(device: str) -> None:
    """A rank's columns as a view: rows that do not start on a word are copied, and give the same."""
    case = product((3, 20, 64), "int4 zeros", 32, torch.float32, device)
    x, weight, scale, zero = case.tensors
    for wider, begin in ((40, 8), (39, 3)):
        held = torch.zeros(20, wider, dtype=torch.uint8, device=device)
        held[:, begin : begin + 32] = weight
        view = held[:, begin : begin + 32]
        assert torch.equal(gemm.quantized_matmul(x, view, scale, zero, backend="triton"), case.run("triton"))


def test_int8_activations_are_rounded_like_the_reference(device: str) -> None:
    from qwen3next_plugin.kernels.gemm import triton_integer

    x = torch.randn(7, 1300, device=device).to(torch.bfloat16)
    x[2] = 0
    for found, expected in zip(triton_integer.quantize_int8_tokens(x), integer.quantize_int8_tokens(x), strict=True):
        assert torch.equal(found, expected)


def test_int32_sums_are_exact(device: str) -> None:
    """The largest sums of INT8: every code 127 or -128, with 2048 columns."""
    x = torch.full((2, 2048), 127.0, device=device)
    x[1] = -127.0
    weight = torch.full((16, 2048), 127, dtype=torch.int8, device=device)
    weight[8:] = -128
    found = gemm.quantized_matmul(
        x, weight, torch.ones(16, 1, device=device), quantize_activations=True, backend="triton"
    )
    expected = x.double() @ weight.double().T
    assert torch.equal(found.double(), expected)


def test_custom_op(device: str) -> None:
    for form in FORMATS:
        x, weight, scale, zero = product((4, 24, 64), form, 64, torch.float32, device).tensors
        options = {"quantize_activations": form == "int8 activations"}
        torch.library.opcheck(torch.ops.qwen3next.quantized_matmul.default, (x, weight, scale, zero), options)
        assert_compiles(lambda *t: gemm.quantized_matmul(*t), x, weight, scale, zero)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_fp8_with_a_factor_a_row(dtype: torch.dtype, backend: str, device: str) -> None:
    x = torch.randn(5, 300, device=device).to(dtype)
    weight, scale = gemm.quantize_block(torch.randn(40, 300, device=device), (1, 300))
    assert gemm.block_size(weight, scale) == (1, 512)
    expected = x.double() @ (weight.double() * scale.double()).T
    actual = gemm.block_fp8_matmul(x, weight, scale, backend=backend)
    assert_close(actual, expected, limit(dtype, "fp8", backend, device))


def test_activations_are_kept_where_rows_have_factors(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setattr(gemm, "quantizes_activations", lambda rows, device: True)
    x = torch.randn(5, 256, device=device)
    weight, scale = gemm.quantize_block(torch.randn(40, 256, device=device), (1, 256))
    kept = gemm.block_fp8_matmul(x, weight, scale, backend="triton")
    assert torch.equal(kept, gemm.block_fp8_matmul(x, weight, scale, quantize_activations=False, backend="triton"))


def test_wrong_arguments() -> None:
    x, weight, scale, zero = product((4, 16, 64), "int4 zeros", 32, torch.float32, "cpu").tensors
    matmul = gemm.quantized_matmul
    with pytest.raises(ValueError, match=r"x is \[4, 63\] and weight is torch.uint8 \[16, 32\]"):
        matmul(x[:, 1:], weight, scale, zero)
    with pytest.raises(ValueError, match="weight is torch.float32; with scales it must be"):
        matmul(x, torch.ones(16, 64), scale)
    with pytest.raises(ValueError, match="use block_fp8_matmul"):
        matmul(x, torch.ones(16, 64).to(gemm.FP8), scale)
    with pytest.raises(ValueError, match=r"scale is \[16, 3\] for weight \[16, 32\] \(64 columns of INT4\)"):
        matmul(x, weight, scale[:, :1].expand(16, 3), zero)
    with pytest.raises(ValueError, match=r"groups of 8; at least 16 columns must share a scale"):
        matmul(x, weight, scale[:, :1].expand(16, 8))
    with pytest.raises(ValueError, match="scale is torch.float64; it must be"):
        matmul(x, weight, scale.double(), zero)
    with pytest.raises(ValueError, match=r"zero is torch.uint8 \[16, 1\]; it must be uint8 \[16, 2\]"):
        matmul(x, weight, scale, zero[:, :1])
    with pytest.raises(ValueError, match="zero is torch.int32"):
        matmul(x, weight, scale, zero.int())
    with pytest.raises(
        ValueError, match=r"weight \[16, 2\] \(4 columns of INT4\): INT4 columns must be a multiple of 8"
    ):
        matmul(x[:, :4], weight[:, :2], scale[:, :1])
    with pytest.raises(ValueError, match="weight is INT4, which takes activations as they are"):
        matmul(x, weight, scale, zero, quantize_activations=True)
    codes, fine = integer.quantize_int8(torch.randn(16, 64), 32)
    with pytest.raises(
        ValueError, match=r"scale is \[16, 2\]; INT8 activations need one scale a row of weight, \[16, 1\]"
    ):
        matmul(x, codes, fine, quantize_activations=True)
    with pytest.raises(ValueError, match="zero was given with weight torch.int8; only INT4"):
        matmul(x, codes, fine, zero)
    with pytest.raises(ValueError, match="multiple of"):
        matmul(x[:, :36], weight[:, :18], scale[:, :1])


def test_gpus_without_tensor_cores_for_it_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Some GPU")
    with pytest.raises(ValueError, match=r"INT4 and INT8 weights need .* 8\.0 or later; Some GPU has 7\.5"):
        policy.require_integer_products(torch.device("cuda", 0))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("group", [32, 64, 128, 2048])
def test_real_sizes(group: int, form: str, dtype: torch.dtype) -> None:
    if form == "int8 activations" and group != 2048:
        pytest.skip("INT8 activations need one scale a row")
    for rows in (1, 7, 64, 1024):
        case = product((rows, 4096, 2048), form, group, dtype, "cuda")
        assert_close(case.run("triton"), case.expected(), limit(dtype, form, "triton", "cuda"))
        assert_repeatable(case.run, "triton")
