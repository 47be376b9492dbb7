"""What every test leans on: poisoned memory, one error measure, and an environment for engine processes."""

import os
import subprocess
import sys
from pathlib import Path

import torch

# Variables that steer this test process and would change what an engine does if it inherited them.
TEST_ONLY_VARIABLES = ("TRITON_INTERPRET", "PROOF", "PYTEST_CURRENT_TEST", "PYTEST_ADDOPTS", "PYTEST_XDIST_WORKER")


def nan_like(
    *shape_or_tensor: int | torch.Tensor,
    dtype: torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """A tensor full of poison, to be handed to an operation as its output or state.

    Takes a tensor (its shape, strides, dtype and device are used) or sizes. Floating types are filled with NaN, integer
    types with their smallest value, bool with True: what an operation forgets to write then shows in any comparison.
    Arithmetic fill is not defined for float8, so those bytes are set to 0x7F, which is NaN in E4M3 and E5M2.
    """
    if len(shape_or_tensor) == 1 and isinstance(shape_or_tensor[0], torch.Tensor):
        result = torch.empty_like(shape_or_tensor[0], dtype=dtype, device=device)
    else:
        sizes = [int(size) for size in shape_or_tensor]
        result = torch.empty(sizes, dtype=dtype or torch.float32, device=device or "cpu")
    if result.dtype is torch.bool:
        return result.fill_(True)
    if not result.dtype.is_floating_point:
        return result.fill_(torch.iinfo(result.dtype).min)
    if result.dtype.itemsize == 1:
        result.view(torch.uint8).fill_(0x7F)
        return result
    return result.fill_(float("nan"))


def relative_error(x: torch.Tensor, ref64: torch.Tensor) -> float:
    """||x - ref|| / ||ref|| in float64 (absolute where the reference is zero); infinite if `x` holds a NaN or an inf.

    `ref64` is the float64 reference: a lower precision is refused, so that no test measures an error against itself.
    """
    assert ref64.dtype is torch.float64, f"the reference has to be float64, got {ref64.dtype}"
    assert x.shape == ref64.shape, f"shapes differ: {tuple(x.shape)} against the reference's {tuple(ref64.shape)}"
    actual = x.detach().to("cpu", torch.float64)
    expected = ref64.detach().to("cpu")
    if not bool(torch.isfinite(actual).all()):
        return float("inf")
    scale = float(torch.linalg.vector_norm(expected))
    return float(torch.linalg.vector_norm(actual - expected)) / (scale or 1.0)


def engine_environment(**extra: str) -> dict[str, str]:
    """A copy of os.environ for an engine process: without what steers the tests (TRITON_INTERPRET first of all)."""
    environment = {name: value for name, value in os.environ.items() if name not in TEST_ONLY_VARIABLES}
    return environment | extra


def tritons() -> list[str]:
    """Folders whose Triton compiles for GPUs: "" for the installed one, and what TRITON_OF_GPUS names.

    A CPU's PyTorch brings another Triton than the engines' CUDA builds, whose compiler may refuse what this one takes.
    """
    return ["", *filter(None, [os.environ.get("TRITON_OF_GPUS")])]


def output_of(module: str, *arguments: str, triton: str = "", **extra: str) -> list[str]:
    """The lines that ``python -m module`` prints in an engine's environment; such scripts compile kernels for GPUs.

    ``triton`` is one of `tritons`.
    """
    if triton:
        extra["PYTHONPATH"] = os.pathsep.join(filter(None, [triton, os.environ.get("PYTHONPATH")]))
    run = subprocess.run(
        [sys.executable, "-m", module, *arguments],
        cwd=Path(__file__).resolve().parents[1],
        env=engine_environment(**extra),
        capture_output=True,
        text=True,
        timeout=1500,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return run.stdout.splitlines()
