"""The interpreter accepts what a GPU's compiler refuses, so these kernels are compiled for GPUs without having one."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import engine_environment

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a program may use on compute capability 8.6 and 8.9
KERNELS = """
_rms_norm_kernel _qk_norm_rope_kernel _sigmoid_gate_kernel _route_kernel _add_shared_expert_kernel
_gate_up_kernel _down_kernel _count_kernel _place_kernel _grouped_kernel _weighted_sum_kernel
_quantize_tokens_kernel _block_fp8_matmul_kernel
"""


@pytest.mark.parametrize("capability", [90, 80])
def test_every_kernel_compiles_and_fits(capability: int) -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_layers", str(capability)],
        cwd=Path(__file__).resolve().parents[2],
        env=engine_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = json.loads(result.stdout.splitlines()[-1])
    assert set(shared) == set(KERNELS.split()) - ({"_quantize_tokens_kernel"} if capability < 89 else set())
    assert all(size <= SMALLEST_SHARED_MEMORY for size in shared.values()), shared
