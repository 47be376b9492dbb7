"""The kernels compile for a GPU, which the interpreter cannot tell."""

import subprocess
import sys
from pathlib import Path

from tests.helpers import engine_environment

KERNELS = ("_prefill_kernel", "_update_kernel", "_chunk_kernel", "_walk_kernel", "_recurrent_kernel")
SHARED_MEMORY = 227 * 1024  # bytes a block may have on an H200


def test_every_kernel_compiles_for_an_h200(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.kernels.compile_for_gpu"],
        cwd=Path(__file__).resolve().parents[2],
        env=engine_environment(TRITON_CACHE_DIR=str(tmp_path)),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    shared = {line.split()[0]: int(line.split("shared=")[1].split()[0]) for line in run.stdout.splitlines()}
    assert set(shared) == set(KERNELS)
    assert max(shared.values()) <= SHARED_MEMORY
