"""Why the stand-ins must not be here: what they stand in for is installed, or torch is a build for a GPU.

Standard library only: the build and every start of Python use it. Nothing is imported to find out; package metadata
and torch's own version file say it.
"""

import re
import sys
import sysconfig
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from . import DISTRIBUTION

REAL = frozenset({"sglang-kernel", "sgl-kernel", "torchvision"})
"""Distributions that the stand-ins stand in for, by canonical name."""

_GPU_BUILD = re.compile(r"^(cuda|hip|xpu)\s*(?::[^=]*)?=\s*['\"]", re.MULTILINE)


def places() -> list[str]:
    """Where packages of this environment are.

    The environment's own folders are named beside sys.path, because pip's build isolation takes them off it.
    """
    paths = sysconfig.get_paths()
    return list(dict.fromkeys([paths["purelib"], paths["platlib"], *sys.path]))


def why_not(where: Iterable[str] | None = None) -> str | None:
    """One sentence that says what is in the way and what to do; None if nothing is."""
    folders = list(places() if where is None else where)
    real, torch_build = {}, None
    for distribution in metadata.distributions(path=folders):
        name = re.sub(r"[-_.]+", "-", distribution.metadata["Name"] or "").lower()
        if name in REAL:
            real[name] = distribution.version
        if name == "torch" and torch_build is None:
            torch_build = _gpu_build(Path(str(distribution.locate_file("torch/version.py"))))
    if real:
        found = " and ".join(f"{name} {version}" for name, version in sorted(real.items()))
        return f"{DISTRIBUTION}: {found} is installed, which this test aid stands in for: uninstall one of the two."
    if torch_build:
        return f"{DISTRIBUTION}: torch is a build for {torch_build}, and this test aid is for a CPU: uninstall it here."
    return None


def _gpu_build(version_file: Path) -> str | None:
    """ "cuda", "hip" or "xpu" if torch/version.py names such a version (they are None in a build for the CPU)."""
    if not version_file.is_file():
        return None
    found = _GPU_BUILD.search(version_file.read_text(encoding="utf-8", errors="replace"))
    return found.group(1) if found else None
