"""What the supported GPUs can do by their makers' figures: for choices that have to be made without measuring."""

import re
from dataclasses import dataclass

KIB = 1024


@dataclass(frozen=True)
class Gpu:
    """One GPU. Bytes are bytes; bandwidth is in GB/s; products in TFLOP/s, dense, with float32 sums.

    name: as the driver gives it; shared_memory: the most one block may have (CUDA C++ Programming Guide, "Technical
    Specifications per Compute Capability": 163 KiB at 8.0, 99 at 8.6, 8.9 and 12.x, 227 at 9.0 and 10.0), an SM having
    1 KiB more; fp8: None without FP8 units; source: where the figures come from.
    """

    name: str
    capability: tuple[int, int]
    sms: int
    shared_memory: int
    l2: int
    bandwidth: float
    bf16: float
    fp8: float | None
    source: str


def _gpu(
    name: str, capability: tuple[int, int], sms: int, l2_mib: int, bandwidth: float, bf16: float, fp8: float | None,
    source: str,
) -> Gpu:  # fmt: skip
    shared = {(8, 0): 163, (9, 0): 227, (10, 0): 227}.get(capability, 99)
    return Gpu(name, capability, sms, shared * KIB, l2_mib * KIB * KIB, bandwidth, bf16, fp8, source)


@dataclass(frozen=True)
class Target:
    """A GPU as far as choices of kernels go: the present one, or one that is only named."""

    name: str
    capability: tuple[int, int]

    @property
    def slug(self) -> str:
        """`gpu_slug` of the name."""
        return gpu_slug(self.name)


NO_GPU = Target("none", (0, 0))

_A100 = "NVIDIA A100 datasheet (80 GB SXM) and A100 architecture whitepaper"
_ALL = (
    _gpu("NVIDIA H200", (9, 0), 132, 50, 4800, 989, 1979, "NVIDIA H200 datasheet; Hopper whitepaper (SMs, L2)"),
    _gpu("NVIDIA H100 80GB HBM3", (9, 0), 132, 50, 3350, 989, 1979, "NVIDIA H100 datasheet (SXM); Hopper whitepaper"),
    _gpu("NVIDIA H20", (9, 0), 78, 60, 4000, 148, 296, "press reports of 2023 (no public datasheet)"),
    _gpu("NVIDIA A100-SXM4-80GB", (8, 0), 108, 40, 2039, 312, None, _A100),
    _gpu("NVIDIA A800-SXM4-80GB", (8, 0), 108, 40, 2039, 312, None, f"{_A100}: A800 differs in NVLink only"),
    _gpu("NVIDIA L40S", (8, 9), 142, 96, 864, 362, 733, "NVIDIA L40S datasheet; Ada whitepaper (AD102)"),
    _gpu("NVIDIA GeForce RTX 4090", (8, 9), 128, 72, 1008, 165.2, 330.3, "NVIDIA Ada whitepaper, appendix A"),
    _gpu("NVIDIA GeForce RTX 5090", (12, 0), 170, 96, 1792, 209.5, 419, "NVIDIA RTX Blackwell whitepaper, appendix A"),
    _gpu(
        "NVIDIA B200", (10, 0), 148, 126, 7700, 2250, 4500, "NVIDIA HGX B200 datasheet, an eighth of it; SMs reported"
    ),
    _gpu(
        "NVIDIA GB10", (12, 1), 48, 24, 273, 125, 250, "DGX Spark: 1 PFLOP/s sparse FP4, an eighth and a quarter of it"
    ),
)


def gpu_slug(name: str) -> str:
    """A short name for files: ``NVIDIA H200`` -> ``h200``, ``NVIDIA GeForce RTX 4090`` -> ``rtx-4090``, a CPU ``cpu``.

    Memory sizes and form factors fall away (``NVIDIA A100-SXM4-80GB`` -> ``a100``).
    """
    words = [w for w in re.split(r"[^a-z0-9]+", name.lower()) if w not in ("", "nvidia", "geforce", "tesla")]
    return "-".join(words[:2] if words[:1] == ["rtx"] else words[:1]) or "unknown"


KNOWN: dict[str, Gpu] = {gpu_slug(gpu.name): gpu for gpu in _ALL}


def target_named(slug: str) -> Target:
    """The GPU that files call so. Raises ValueError for one that is not known."""
    gpu = KNOWN.get(gpu_slug(slug))
    if gpu is None:
        raise ValueError(f"{slug!r} is no GPU known here: use one of {', '.join(KNOWN)}")
    return Target(gpu.name, gpu.capability)
