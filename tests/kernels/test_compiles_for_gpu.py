"""The interpreter accepts what a GPU's compiler refuses: the kernels are compiled for a Hopper GPU without having one."""

import json
import subprocess
import sys

from tests.helpers import engine_environment

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a program may use on compute capability 8.6 and 8.9


def test_every_kernel_compiles_and_fits() -> None:
    result = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        env=engine_environment(),
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    shared = json.loads(result.stdout.splitlines()[-1])
    expected = {"_rms_norm_kernel", "_qk_norm_rope_kernel", "_sigmoid_gate_kernel", "_route_kernel"}
    expected |= {
        "_add_shared_expert_kernel",
        "_count_kernel",
        "_place_kernel",
        "_grouped_kernel",
        "_weighted_sum_kernel",
    }
    expected |= {"_quantize_tokens_kernel", "_block_fp8_matmul_kernel"}
    assert expected == set(shared)
    assert all(size <= SMALLEST_SHARED_MEMORY for size in shared.values()), shared
