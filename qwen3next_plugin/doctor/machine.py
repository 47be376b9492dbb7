"""Findings about the machine: GPUs, and what compiles code at an engine's start."""

from collections import Counter
from collections.abc import Iterator

from .finding import Finding, ok, warning
from .surroundings import Surroundings


def device(s: Surroundings) -> Iterator[Finding]:
    """CPU or NVIDIA GPU, without torch."""
    if s.gpus:
        counted = Counter((gpu.name, gpu.memory_mib, gpu.capability) for gpu in s.gpus)
        shown = [
            f"{count} x {name} ({memory / 1024:.0f} GiB"
            + (f", compute capability {capability[0]}.{capability[1]})" if capability else ")")
            for (name, memory, capability), count in counted.items()
        ]
        yield ok("device", f"{', '.join(shown)}, driver {s.gpus[0].driver}")
    elif s.nvidia_smi.returncode:
        said = (s.nvidia_smi.stdout + s.nvidia_smi.stderr).strip().splitlines()
        found = f"nvidia-smi is there and fails: {said[0] if said else f'exit code {s.nvidia_smi.returncode}'}"
        yield warning("device", found, "mend the NVIDIA driver (reboot after an update), or hand the container its GPU")
    elif s.has_gpu:
        yield ok("device", "an NVIDIA GPU (its driver lists it; nvidia-smi is not here)")
    else:
        yield ok("device", "CPU, no NVIDIA GPU")
    hidden = s.environ.get("CUDA_VISIBLE_DEVICES")
    if s.has_gpu and hidden is not None and hidden.strip() in ("", "-1"):
        yield warning("device", f"CUDA_VISIBLE_DEVICES={hidden} hides the GPU", "unset CUDA_VISIBLE_DEVICES")


def compiler(s: Surroundings) -> Iterator[Finding]:
    """torch.compile and Triton build C and C++ on the machine that serves."""
    if not any(s.which(program) for program in (s.environ.get("CXX") or "g++", "g++", "c++", "clang++")):
        found = "no C++ compiler, and engines compile code when they start"
        yield warning("compiler", found, "install gcc and g++ (Debian: apt-get install build-essential)")
    if not (s.headers / "Python.h").is_file():
        found = "Python.h is missing, and engines compile against it when they start"
        yield warning("compiler", found, "install Python's headers (Debian: apt-get install python3-dev)")
