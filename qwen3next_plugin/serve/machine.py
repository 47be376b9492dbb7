"""What this machine is, found out without PyTorch."""

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from .errors import ServeError

DRIVER_FOLDER = Path("/proc/driver/nvidia/gpus")


def has_nvidia_gpu(driver_folder: Path = DRIVER_FOLDER) -> bool:
    """True if `nvidia-smi -L` lists a GPU, or the kernel driver does (containers often come without nvidia-smi)."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60, check=False)
        if listed.returncode == 0 and "GPU 0" in listed.stdout:
            return True
    except (OSError, subprocess.TimeoutExpired):
        pass
    return driver_folder.is_dir() and any(driver_folder.iterdir())


def choose_device(environ: Mapping[str, str] = os.environ) -> str:
    """ "cpu" or "gpu": what DEVICE says, else what is found.

    Raises ServeError if DEVICE is something else.
    """
    wish = environ.get("DEVICE", "")
    if wish not in ("", "cpu", "gpu"):
        raise ServeError(f"DEVICE={wish} means nothing here; say DEVICE=cpu or DEVICE=gpu, or leave it out.")
    return wish or ("gpu" if has_nvidia_gpu() else "cpu")


def available_memory_gib(meminfo: Path = Path("/proc/meminfo")) -> float:
    """What the kernel says can be taken without swapping, in GiB; 0 where it does not say."""
    try:
        lines = meminfo.read_text().splitlines()
    except OSError:
        return 0.0
    found = [int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")]
    return found[0] / 2**20 if found else 0.0
