"""RMS normalisation: every form, dtype and layout against float64."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import norm
from tests.helpers import nan_like

from .common import BACKENDS, DTYPES, assert_close, assert_compiles, assert_repeatable, to64, tolerance

pytestmark = pytest.mark.usefixtures("poisoned_memory")
CUSTOM_OPS = ("rms_norm", "add_rms_norm")
OPS = (*CUSTOM_OPS, "rms_norm_gated")
EPS = 1e-6


def arguments(op: str, x: torch.Tensor) -> tuple[Any, ...]:
    """(x, [residual or z,] weight, eps) for `op`; the second input is laid out differently from x."""
    weight = (torch.randn(x.shape[-1], device=x.device) * 0.3).to(x.dtype)
    other = torch.randn(*x.shape[:-1], x.shape[-1] + 3, device=x.device).to(x.dtype)[..., 3:]
    return (x, weight, EPS) if op == "rms_norm" else (x, other, weight, EPS)


def column_slice(rows: int, heads: int, width: int, device: str, dtype: torch.dtype) -> torch.Tensor:
    """[rows, heads, width] in the middle of a wider projection: strides that no reshape to rows can express."""
    projection = torch.randn(rows, heads * width + 11, device=device).to(dtype)
    return projection[:, 5 : 5 + heads * width].view(rows, heads, width)


def call(op: str, *args: Any, backend: str | None = None) -> Any:
    """What `op` returns, or, of the gated norm, what it writes."""
    if op != "rms_norm_gated":
        return getattr(norm, op)(*args, backend=backend)
    out = nan_like(*args[0].shape, dtype=args[0].dtype, device=args[0].device)
    norm.rms_norm_gated(*args, out=out, backend=backend)
    return out


def check(op: str, x: torch.Tensor, backend: str | None) -> None:
    args = arguments(op, x)
    actual = call(op, *args, backend=backend)
    expected = getattr(norm.reference, op)(*to64(args))
    assert_close(
        actual, expected, tolerance(x.dtype, 2 if op == "add_rms_norm" else 1, backend or "triton", x.device.type)
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("shape", [(5, 24), (1, 64), (37, 130), (17,), (2, 3, 2, 16)])
def test_contiguous(op: str, dtype: torch.dtype, backend: str, shape: tuple[int, ...], device: str) -> None:
    check(op, torch.randn(*shape, device=device).to(dtype), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_column_slices_and_transposes(op: str, backend: str, device: str) -> None:
    check(op, column_slice(9, 3, 20, device, torch.float32), backend)
    check(op, torch.randn(12, 7, device=device).T, backend)
    check(op, torch.randn(2, 30, 4, 16, device=device)[:, ::5].transpose(0, 2), backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("op", OPS)
def test_no_rows(op: str, backend: str, device: str) -> None:
    x = torch.empty(0, 3, 8, device=device)
    result = call(op, *arguments(op, x), backend=backend)
    for tensor in (result,) if isinstance(result, torch.Tensor) else result:
        assert tensor.shape == x.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_weight_is_zero_centred_and_the_mean_stays(backend: str, device: str) -> None:
    x = torch.full((1, 8), 3.0, device=device)
    y = norm.rms_norm(x, torch.zeros(8, device=device), 0.0, backend=backend)
    torch.testing.assert_close(y, torch.ones_like(y))  # subtracting the mean would give zeros


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_rounded_sum_is_what_is_normalised(backend: str, device: str) -> None:
    x = torch.randn(6, 40, device=device).to(torch.float16) * 8
    residual = torch.randn_like(x)
    weight = torch.zeros(40, device=device, dtype=x.dtype)
    y, total = norm.add_rms_norm(x, residual, weight, EPS, backend=backend)
    assert torch.equal(total, x + residual)
    assert torch.equal(y, norm.rms_norm(total, weight, EPS, backend=backend))


@pytest.mark.parametrize("op", OPS)
def test_inputs_are_left_alone_and_results_repeat(op: str, device: str) -> None:
    args = arguments(op, torch.randn(5, 24, device=device))
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in args]
    for backend in BACKENDS:
        assert_repeatable(call, op, *args, backend=backend)
    for a, b in zip(args, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_gated_norm_in_place(dtype: torch.dtype, backend: str, device: str) -> None:
    x, z, weight, eps = arguments("rms_norm_gated", torch.randn(9, 3, 20, device=device).to(dtype))
    apart = call("rms_norm_gated", x, z, weight, eps, backend=backend)
    norm.rms_norm_gated(x, z, weight, eps, out=x, backend=backend)
    assert torch.equal(x, apart)


@pytest.mark.parametrize("op", CUSTOM_OPS)
def test_custom_op(op: str, device: str) -> None:
    args = arguments(op, column_slice(4, 2, 16, device, torch.bfloat16))
    torch.library.opcheck(getattr(torch.ops.qwen3next, op).default, args)
    assert_compiles(lambda *a: getattr(norm, op)(*a), *args)


def gated(x: torch.Tensor, z: torch.Tensor, out: torch.Tensor) -> None:
    norm.rms_norm_gated(x, z, torch.ones(8), EPS, out=out)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda: norm.rms_norm(torch.ones(2, 8), torch.ones(4), EPS), r"weight is \[4\] and x is \[2, 8\].*\[8\]"),
        (lambda: norm.rms_norm(torch.ones(()), torch.ones(1), EPS), "scalar"),
        (lambda: norm.add_rms_norm(torch.ones(2, 8), torch.ones(3, 8), torch.ones(8), EPS), r"\[2, 8\].*\[3, 8\]"),
        (lambda: gated(torch.ones(2, 8), torch.ones(2, 8).half(), out=torch.ones(2, 8)), "float16"),
        (lambda: gated(torch.ones(2, 8), torch.ones(2, 8), out=torch.ones(2, 7)), r"out is \[2, 7\].*\[2, 8\]"),
        (lambda: gated(torch.ones(2, 8), torch.ones(2, 8), out=torch.ones(8, 2).T), "contiguous"),
    ],
)
def test_wrong_arguments(wrong: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()


@pytest.mark.gpu
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_sizes(op: str, dtype: torch.dtype) -> None:
    for rows in (1, 7, 64, 1024):
        check(op, torch.randn(rows, 2048, device="cuda").to(dtype), None)
        check(op, column_slice(rows, 32, 128, "cuda", dtype), None)
