"""Builds what an engine's first start would wait minutes of a C++ compiler for, while the oracle runs and weights load.

Run as a program in an engine's environment, with the caches of its visits:
``python -m qwen3next_plugin.bench.prebuild vllm 9.0``, the GPU's compute capability behind the engine. Both sides of a
comparison find it there; where starts are measured nothing is built beforehand. What cannot be built is left to the
engine.
"""

import os
import sys
from collections.abc import Iterator
from typing import Any

HOPPER = "9.0"


def modules(engine: str, capability: str) -> Iterator[Any]:
    """FlashInfer's modules that an engine uses on such a GPU and that do not come compiled; none without FlashInfer."""
    if engine != "vllm" or capability != HOPPER:
        return
    # Else FlashInfer asks the GPU, which takes memory that an engine may be counting.
    os.environ.setdefault("FLASHINFER_CUDA_ARCH_LIST", f"{HOPPER}a")
    try:
        from flashinfer.jit.gemm import gen_fp8_blockscale_gemm_sm90_module
    except ImportError:
        return
    yield gen_fp8_blockscale_gemm_sm90_module()  # products of few rows with FP8 blocks: over two minutes


def main(engine: str, capability: str) -> None:
    """Builds all of them; says what failed, and goes on."""
    for module in modules(engine, capability):
        try:
            module.build_and_load()
        except Exception as error:
            print(f"{module.name}: {type(error).__name__}: {error}", file=sys.stderr)
        else:
            print(module.name)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
