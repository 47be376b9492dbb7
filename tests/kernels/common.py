"""Dtypes, tolerances and checks that hold for every operation."""

from collections.abc import Callable
from typing import Any

import torch

from tests.helpers import relative_error

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
BACKENDS = ("reference", "triton")
# float8 has no multiplication, which opcheck's schema test uses to look for mutated inputs
FP8_CHECKS = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


def tolerance(dtype: torch.dtype, roundings: int = 1, backend: str = "reference", device: str = "cpu") -> float:
    """Allowed relative error after so many roundings to `dtype`.

    Triton's interpreter cuts float32 off when it stores bf16, instead of rounding it, which costs twice the error.
    """
    unit = {torch.float32: 1e-6, torch.float16: 5e-4, torch.bfloat16: 3e-3}[dtype]
    cut = 2 if dtype is torch.bfloat16 and backend == "triton" and device == "cpu" else 1
    return unit * roundings * cut


def to64(values: Any) -> Any:
    """The arguments in float64: floating tensors are widened, everything else stays."""
    if isinstance(values, torch.Tensor) and values.is_floating_point():
        return values.double()
    if isinstance(values, (list, tuple)):
        return type(values)(to64(value) for value in values)
    return values


def assert_close(actual: Any, expected: Any, limit: float) -> None:
    """Each tensor of `actual` within `limit` of the float64 tensor of `expected`."""
    pairs = [(actual, expected)] if isinstance(actual, torch.Tensor) else list(zip(actual, expected, strict=True))
    for place, (got, wanted) in enumerate(pairs):
        error = relative_error(got, wanted)
        assert error <= limit, f"output {place}: relative error {error:.2e}, allowed {limit:.2e}"


def assert_repeatable(op: Callable[..., Any], *args: Any, **options: Any) -> None:
    """Two calls give the same bits; on a GPU, where programs run in any order, a thousand do."""

    def results() -> tuple[torch.Tensor, ...]:
        found = op(*args, **options)
        return (found,) if isinstance(found, torch.Tensor) else tuple(found)

    first = results()
    for _ in range(1000 if first[0].is_cuda else 1):
        assert all(torch.equal(one, other) for one, other in zip(first, results(), strict=True))


def assert_compiles(op: Callable[..., Any], *args: Any) -> None:
    """`op(*args)` is one graph for torch.compile, with dynamic shapes, and gives what it gives when called."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, dynamic=True, backend="aot_eager")
    plain, traced = op(*args), compiled(*args)
    for a, b in zip(*(((r,) if isinstance(r, torch.Tensor) else r) for r in (plain, traced)), strict=True):
        assert torch.equal(a, b)
