"""Look into an environment with its own interpreter, without importing what is installed there."""

import json
import subprocess
from pathlib import Path

from .plan import canonical

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


def inspect(python: Path) -> dict[str, str]:
    """Name -> version of every completely installed distribution."""
    return {canonical(name): version for name, version in json.loads(_run(python, _LIST)) if name}


def remove_half_installed(python: Path) -> list[str]:
    """Forget packages whose installation was cut short, so that pip installs them again; returns what was removed."""
    return _run(python, _REMOVE_HALF).split()
