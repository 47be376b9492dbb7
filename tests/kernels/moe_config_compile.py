"""Compile the grouped products with some configs for GPUs that are not here, and say what shared memory each takes.

Run as a script, without TRITON_INTERPRET; launches are caught, as in compile_for_gpu.py. One JSON list goes to stdout:
[mode, activation bytes, block_m, product (0 gate-up, 1 down), tile, capability, bytes] a compiled kernel.
"""

import json
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels import gemm
from qwen3next_plugin.kernels.moe import triton as moe
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile, forced

TYPES = {
    torch.bfloat16: "*bf16",
    torch.float8_e4m3fn: "*fp8e4nv",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}
CONFIGS = (
    MoeConfig(16, Tile(64, 64, 4, 4), Tile(128, 64, 4, 3)),
    MoeConfig(64, Tile(64, 64, 4, 3), Tile(128, 128, 4, 2)),
)
EXPERTS, HIDDEN, INNER, TOP_K = 4, 512, 256, 2
compiled: list[list[Any]] = []


def catch(self: JITFunction, *args: Any, grid: Any = None, warmup: bool = False, **keywords: Any) -> None:
    """Stands in for a launch: the grouped product is compiled for every target, other kernels are left out."""
    if "SWIGLU" not in keywords:
        return
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    values = dict(zip(self.arg_names, args, strict=False)) | keywords
    for place, parameter in enumerate(self.params):
        value = values.pop(parameter.name)
        if parameter.is_constexpr:
            signature[parameter.name], constants[(place,)] = "constexpr", value
            continue
        signature[parameter.name] = TYPES[value.dtype] if isinstance(value, torch.Tensor) else "i32"
        if isinstance(value, torch.Tensor) or value % 16 == 0:
            attributes[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(self, signature, constants, attributes)
    size = keywords
    tile = [size["BLOCK_N"], size["BLOCK_K"], values["num_warps"], values["num_stages"]]
    for capability in (90, 100) if size["A_FP8"] else (89, 90) if size["W_FP8"] else (80, 90):
        found = triton.compile(source, GPUTarget("cuda", capability, 32), values)
        mode, taken = "fp8" if size["W_FP8"] else "bf16", found.metadata.shared
        product = 0 if size["SWIGLU"] else 1
        compiled.append([mode, 1 if size["A_FP8"] else 2, size["BLOCK_M"], product, tile, capability, taken])


def launch_all() -> None:
    """Every config in bf16, with FP8 weights, and with FP8 on both sides."""
    x = torch.zeros(32, HIDDEN, dtype=torch.bfloat16)
    w13 = torch.zeros(EXPERTS, 2 * INNER, HIDDEN, dtype=torch.bfloat16)
    w2 = torch.zeros(EXPERTS, HIDDEN, INNER, dtype=torch.bfloat16)
    routing = (torch.zeros(32, TOP_K), torch.zeros(32, TOP_K, dtype=torch.int32))
    (q13, s13), (q2, s2) = gemm.quantize_block(w13), gemm.quantize_block(w2)
    for config in CONFIGS:
        with forced(config):
            moe.fused_moe(x, w13, w2, *routing, None, None, False)
            for rounded in (False, True):
                moe.fused_moe(x, q13, q2, *routing, s13, s2, rounded)


if __name__ == "__main__":
    JITFunction.run = catch
    launch_all()
    print(json.dumps(compiled))
