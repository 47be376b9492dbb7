"""Compile the products with INT4, INT8 and row-scaled FP8 weights for a GPU on a machine that has none.

Run as a process of its own, without TRITON_INTERPRET, with the compute capability as argument: see compile_layers.py.
The launches are those of the published model's experts, whole and as one of eight ranks, and of its dense layers.
Prints one JSON list: [kernel, format, group of columns (0: all), BLOCK_M, BLOCK_N, BLOCK_K, shared memory, registers,
bytes spilled] a variant.
"""

import json
import re
import subprocess
import tempfile
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels.gemm import policy, triton_integer
from qwen3next_plugin.kernels.moe import triton as moe

from .compile_layers import CAPABILITY, EXPERTS, HIDDEN, INNER, TOP_K, NamesTargetOnly

FORMATS = ("int4", "int4 zeros", "int8", "int8 activations", "fp8 rows")
found: list[list[Any]] = []
form = ""


def registers_and_spills(cubin: bytes) -> tuple[int, int]:
    """What ptxas took for the one kernel of a binary: registers a thread, and bytes of local memory it spills to."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def compile_only(run: Any) -> Any:
    """`JITFunction.run` without the launch, noting what was compiled."""

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        if "BLOCK_K" in options:
            group = options["GROUP"] if "GROUP" in options else options["SCALE_K"]
            sizes = [options[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")]
            used = registers_and_spills(kernel.asm["cubin"])
            found.append([self.fn.__name__, form, group, *sizes, kernel.metadata.shared, *used])
        return kernel

    return compiled


def weight(rows: tuple[int, ...], columns: int, group: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Zeros in the present format: (weight, scale, zero)."""
    scale = torch.zeros(*rows, columns // group, dtype=torch.bfloat16)
    if form == "fp8 rows":
        return torch.zeros(*rows, columns, dtype=torch.float8_e4m3fn), torch.zeros(*rows, 1), None
    if form.startswith("int8"):
        return torch.zeros(*rows, columns, dtype=torch.int8), scale, None
    zero = torch.zeros(scale.shape, dtype=torch.uint8) if form == "int4 zeros" else None
    return torch.zeros(*rows, columns // 2, dtype=torch.uint8), scale, zero


def launch_experts(tokens: int, inner: int) -> None:
    """One rank's experts; groups of 128 columns, or all that it holds."""
    x = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16)
    router, ids = torch.zeros(tokens, TOP_K), torch.zeros(tokens, TOP_K, dtype=torch.int32)
    whole = form in ("int8 activations", "fp8 rows")
    w13, s13, z13 = weight((EXPERTS, 2 * inner), HIDDEN, HIDDEN if whole else 128)
    w2, s2, z2 = weight((EXPERTS, HIDDEN), inner, inner if whole else min(128, inner))
    moe.fused_moe(x, w13, w2, router, ids, s13, s2, form == "int8 activations", z13, z2)


def launch_dense(tokens: int, group: int) -> None:
    """A dense layer."""
    x, rounded = torch.zeros(tokens, HIDDEN, dtype=torch.bfloat16), form == "int8 activations"
    triton_integer.quantized_matmul(x, *weight((4096,), HIDDEN, HIDDEN if rounded else group), rounded)


def main() -> None:
    """Compile, then print the list."""
    global form
    driver.set_active(NamesTargetOnly())
    JITFunction.run = compile_only(JITFunction.run)
    policy.decodes_weights = lambda device: CAPABILITY < 89
    for form in FORMATS:
        for tokens in (1, 1000):  # the first and the last row of the table of tile sizes
            launch_experts(tokens, INNER)
        if form != "fp8 rows":
            launch_dense(1, 128)
    form = "int4 zeros"
    launch_experts(1, INNER // 8)
    launch_dense(100, 128)
    for group in (16, 32):
        launch_dense(1, group)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
