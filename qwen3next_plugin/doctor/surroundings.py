"""Everything the doctor looks at, behind one object: packages, environment variables, files and other programs.

Nothing here imports torch or an engine: versions come from package metadata, and what can only be known by importing
is asked of a subprocess with a time limit. Tests hand in folders and programs of their own.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import metadata
from importlib.machinery import PathFinder
from pathlib import Path

import qwen3next_plugin
from qwen3next_plugin.serve.machine import DRIVER_FOLDER
from qwen3next_plugin.serve.plan import canonical, is_cuda_package, requirement_name

_VERSION_LINE = re.compile(r"^__version__\s*(?::[^=]*)?=\s*['\"]([^'\"]+)", re.MULTILINE)


@dataclass(frozen=True)
class Outcome:
    """How a program ended; ``returncode`` is None if it could not be started or took too long."""

    returncode: int | None
    stdout: str = ""
    stderr: str = ""


@dataclass(frozen=True)
class Gpu:
    """One line of nvidia-smi; ``capability`` is None where it does not say."""

    name: str
    capability: tuple[int, int] | None
    memory_mib: int
    driver: str


@dataclass(frozen=True)
class Surroundings:
    """``path`` is where packages are looked up, ``imported`` the folder this package was imported from, ``folder`` the
    current one, ``headers`` where Python's C headers are."""

    path: Sequence[str] = field(default_factory=lambda: tuple(sys.path))
    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    python: Path = Path(sys.executable)
    folder: Path = field(default_factory=Path.cwd)
    imported: Path = Path(qwen3next_plugin.__file__ or "").parent
    driver_folder: Path = DRIVER_FOLDER
    headers: Path = Path(sysconfig.get_path("include"))
    checkpoint: Path | None = None

    @cached_property
    def packages(self) -> dict[str, list[metadata.Distribution]]:
        """Canonical name to its distributions, the one that Python takes first."""
        found: dict[str, list[metadata.Distribution]] = {}
        seen = set()
        for entry in self.path:
            place = Path(entry or self.folder).resolve()
            if place not in seen:
                seen.add(place)
                for distribution in metadata.distributions(path=[str(place)]):
                    if name := distribution.metadata["Name"]:
                        found.setdefault(canonical(name), []).append(distribution)
        return found

    def version(self, name: str) -> str | None:
        """The version of an installed distribution, None if there is none."""
        return self.packages[name][0].version if name in self.packages else None

    def requirements(self, name: str) -> list[str]:
        """What an installed distribution says it requires."""
        return list(self.packages[name][0].requires or []) if name in self.packages else []

    def build(self, name: str) -> str | None:
        """What a distribution was built for: "cpu", "cu130", "rocm7", "cuda" …; None if nothing says so.

        A plain index drops the local part of a version; then the package's own version.py has it, or its requirements
        give it away.
        """
        if name not in self.packages:
            return None
        text = self.packages[name][0].version
        if "+" not in text:
            file = Path(str(self.packages[name][0].locate_file(f"{name}/version.py")))
            line = _VERSION_LINE.search(file.read_text(encoding="utf-8", errors="replace")) if file.is_file() else None
            text = line.group(1) if line else text
        if "+" in text:
            return text.partition("+")[2].split(".")[0]
        return "cuda" if any(is_cuda_package(requirement_name(line)) for line in self.requirements(name)) else None

    def has_module(self, name: str) -> bool:
        """Whether ``import name`` would find a top-level module."""
        return PathFinder.find_spec(name, [entry or str(self.folder) for entry in self.path]) is not None

    def which(self, program: str) -> Path | None:
        """Where a shell would find a program."""
        found = shutil.which(program, path=self.environ.get("PATH", os.defpath))
        return Path(found) if found else None

    def run(self, command: Sequence[str | Path], timeout: float, defaults: Mapping[str, str] | None = None) -> Outcome:
        """Run a program to its end, in this environment; never raises. ``defaults`` are variables that may be set."""
        program = self.which(str(command[0]))
        if program is None:
            return Outcome(None, stderr=f"{command[0]} was not found")
        arguments = [str(part) for part in command[1:]]
        try:
            result = subprocess.run(
                [str(program), *arguments],
                capture_output=True,
                text=True,
                errors="replace",
                stdin=subprocess.DEVNULL,
                timeout=timeout,
                env={**(defaults or {}), **self.environ},
                cwd=self.folder,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return Outcome(None, stderr=f"{program.name} gave no answer within {timeout:.0f} s")
        except OSError as error:
            return Outcome(None, stderr=f"{program.name} could not be started ({error.strerror})")
        return Outcome(result.returncode, result.stdout, result.stderr)

    @cached_property
    def nvidia_smi(self) -> Outcome:
        """What nvidia-smi says of each GPU: name, compute capability, memory in MiB, driver."""
        query = "--query-gpu=name,compute_cap,memory.total,driver_version"
        return self.run(["nvidia-smi", query, "--format=csv,noheader,nounits"], timeout=30)

    @cached_property
    def gpus(self) -> list[Gpu]:
        """The GPUs that nvidia-smi lists."""
        lines = self.nvidia_smi.stdout.splitlines() if self.nvidia_smi.returncode == 0 else []
        return [_gpu(line) for line in lines if line.count(",") == 3]

    @property
    def has_gpu(self) -> bool:
        """Whether there is an NVIDIA GPU; containers may have one without nvidia-smi."""
        return bool(self.gpus) or (self.driver_folder.is_dir() and any(self.driver_folder.iterdir()))


def _gpu(line: str) -> Gpu:
    name, capability, memory, driver = (part.strip() for part in line.split(","))
    numbers = re.fullmatch(r"(\d+)\.(\d+)", capability)
    return Gpu(
        name,
        (int(numbers[1]), int(numbers[2])) if numbers else None,
        int(memory) if memory.isdigit() else 0,
        driver,
    )


def folder_of(distribution: metadata.Distribution) -> Path:
    """The folder that holds a distribution's metadata."""
    return Path(str(getattr(distribution, "_path", distribution.locate_file(""))))
