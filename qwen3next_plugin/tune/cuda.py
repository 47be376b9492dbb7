"""The GPU at hand: what it is, and how long a config of the experts takes on it.

A model's layers follow one another, so a layer's weights are never in the L2 cache when it begins. The same must hold
here: one CUDA graph calls the mixture many times, with other experts and, where memory allows, other layers' weights
each time, until several times the L2 cache has been read before anything comes round again.
"""

import hashlib
import math
import platform
from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin.bench.ceilings import machine_id, measure_ceilings
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels import gemm, moe
from qwen3next_plugin.kernels.gpus import KNOWN, Gpu, gpu_slug
from qwen3next_plugin.kernels.moe import reference
from qwen3next_plugin.kernels.moe.config import MoeConfig, forced
from qwen3next_plugin.kernels.moe.ways import rounds

from .measuring import GpuLostError, TrialError, in_short
from .problem import Problem

_LAYERS = 4  # at most; fewer where memory is short
_CALLS = 32  # of the mixture in one graph, at most
_L2_TIMES = 4  # how often the L2 cache is filled before a graph's first weights come round again
_REPEATS = 5
_REPEAT_MS = 10.0
_CHECKED_ROWS = 64
_NO_GPU = (
    "There is no NVIDIA GPU here that PyTorch can use, and kernels are measured on the GPU that will serve: run it "
    "there (until then the shipped files decide)."
)


def this_gpu() -> Gpu:
    """The current GPU: what the driver says of it, bandwidth and products from the table or, unknown, measured.

    Raises SettingsError where there is none.
    """
    if not torch.cuda.is_available():
        raise SettingsError(_NO_GPU)
    device: Any = torch.cuda.get_device_properties(torch.cuda.current_device())  # not all of it is in torch's stubs
    known = KNOWN.get(gpu_slug(device.name))
    if known is None:
        best = measure_ceilings()["ceilings"]
        known = Gpu("", (0, 0), 0, 0, 0, best["copy_gb_s"], best["bf16_tflop_s"], best["fp8_tflop_s"], "measured here")
    return replace(
        known,
        name=device.name,
        capability=(device.major, device.minor),
        sms=device.multi_processor_count,
        shared_memory=device.shared_memory_per_block_optin,
        l2=device.L2_cache_size,
    )


def moe_files() -> list[Path]:
    """The sources of the experts' kernels."""
    folder = Path(moe.__file__).resolve().parent
    products = (folder.parent / "gemm" / name for name in ("triton.py", "triton_integer.py", "policy.py"))
    return [path for path in (*folder.rglob("*.py"), *products) if path.name != "config.py"]


def versions(files: Iterable[Path]) -> dict[str, str]:
    """What a measurement depends on besides the GPU: versions, and a digest of the kernels' ``files``."""
    digest = hashlib.sha256(b"".join(path.read_bytes() for path in sorted(files)))
    found = {name: metadata.version(name) for name in ("torch", "triton")}
    return found | {"cuda": torch.version.cuda or "none", "kernels": digest.hexdigest()[:12]}


def this_machine() -> str:
    """A name for this start of this machine that says nothing else about it."""
    return hashlib.sha256(machine_id().encode()).hexdigest()[:8] + f" {platform.machine()}"


def layers_that_fit(problem: Problem) -> int:
    """How many layers' weights to make in the GPU's free memory. Raises SettingsError if not even one fits."""
    layer = 3 * problem.experts * problem.hidden * problem.inner * problem.weight_bytes
    free, _ = torch.cuda.mem_get_info()
    count = min(_LAYERS, int(0.6 * free / layer))
    if count < 1:
        raise SettingsError(
            f"One layer's experts take {layer / 2**30:.1f} GiB and {free / 2**30:.1f} GiB of the GPU are free: "
            "free some, or tune a share of them with --tp or --ep."
        )
    return count


class CudaMachine:
    """A GPU with some layers' weights of one problem on it; on a CPU only `error` works."""

    def __init__(self, problem: Problem, gpu: Gpu, layers: int, device: torch.device) -> None:
        self.problem = problem
        self.gpu = gpu
        self.device = device
        self.generator = torch.Generator(device).manual_seed(0)
        self.layers = [self._weights() for _ in range(layers)]
        self.tokens = 0
        self.calls: list[tuple[Any, ...]] = []

    def _weights(self) -> tuple[Any, ...]:
        p = self.problem
        shapes = ((p.experts, 2 * p.inner, p.hidden), (p.experts, p.hidden, p.inner))
        matrices, factors = [], []
        for shape in shapes:
            weight = torch.empty(shape, dtype=p.dtype, device=self.device)
            parts = []
            for n in range(p.experts):  # one by one: all of them in float32 need not fit
                made = torch.randn(shape[1:], device=self.device, generator=self.generator) / shape[2] ** 0.5
                if p.mode == "fp8":
                    halves = made.unflatten(0, (2, -1)) if shape is shapes[0] else made[None]
                    block = min(128, p.inner & -p.inner)
                    sizes = (block, 128) if shape is shapes[0] else (128, block)
                    made, scale = (t.flatten(0, 1) for t in gemm.quantize_block(halves, sizes))
                    parts.append(scale)
                weight[n] = made
            matrices.append(weight)
            factors.append(torch.stack(parts) if parts else None)
        return (*matrices, *factors)

    def _prepare(self, tokens: int) -> None:
        """Inputs for so many tokens: enough calls that nothing is still in the L2 cache when it is asked for again."""
        if tokens == self.tokens:
            return
        self.tokens, self.calls = 0, []  # what fails here leaves no half of it behind
        p = self.problem
        read = p.touched(tokens) * 3 * p.hidden * p.inner * p.weight_bytes
        count = max(len(self.layers), min(_CALLS, math.ceil(_L2_TIMES * self.gpu.l2 / read)))
        for n in range(count):
            x = torch.randn(tokens, p.hidden, device=self.device, generator=self.generator).to(torch.bfloat16)
            logits = torch.randn(tokens, p.total_experts, device=self.device, generator=self.generator)
            weights, ids = moe.route(logits, p.top_k, True)
            w13, w2, s13, s2 = self.layers[n % len(self.layers)]
            self.calls.append((x, w13, w2, weights, torch.where(ids < p.experts, ids, -1), s13, s2))
        self.tokens = tokens

    def _all_calls(self) -> None:
        for call in self.calls:
            moe.fused_moe(*call)

    def once(self, tokens: int, config: MoeConfig) -> Callable[[], object]:
        """The first call."""
        self._prepare(tokens)

        def call() -> torch.Tensor:
            with forced(config):
                return moe.fused_moe(*self.calls[0])

        return call

    def seconds(self, tokens: int, config: MoeConfig) -> float:
        """The shortest mean over a graph's calls among some repeats: what disturbs a GPU only ever adds time."""
        self._prepare(tokens)
        try:
            with forced(config):
                self._all_calls()  # compiles
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    self._all_calls()
            first = self._replayed_ms(graph, 2)
            replays = max(1, int(_REPEAT_MS / max(first, 1e-3)))
            best = min(self._replayed_ms(graph, replays) for _ in range(_REPEATS))
        except Exception as error:
            raise refused(error, self.device) from None
        return best * 1e-3 / len(self.calls)

    def _replayed_ms(self, graph: torch.cuda.CUDAGraph, replays: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(replays):
            graph.replay()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / replays

    def error(self, tokens: int, config: MoeConfig) -> float:
        """Of some of the output's rows, spread over all of them, in the first call."""
        self._prepare(tokens)
        x, w13, w2, weights, ids, s13, s2 = self.calls[0]
        rows = torch.linspace(0, tokens - 1, min(tokens, _CHECKED_ROWS), device=self.device).long()
        rounded = rounds(tokens, w13, s13)
        expected = reference.fused_moe(x[rows], w13, w2, weights[rows], ids[rows], s13, s2, rounded).cpu().double()
        try:
            with forced(config):
                actual = moe.fused_moe(*self.calls[0])[rows].cpu().double()
        except Exception as error:
            raise refused(error, self.device) from None
        if not bool(torch.isfinite(actual).all()):
            return float("inf")
        return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


def refused(error: Exception, device: torch.device) -> TrialError | GpuLostError:
    """What a failed run means: the GPU still answers, or it does not."""
    said = in_short(error)
    try:
        torch.zeros(1, device=device).item()  # waits for the GPU
    except Exception:
        return GpuLostError(said)
    return TrialError(said)
