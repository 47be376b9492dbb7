"""What pip may fetch on a CPU machine, decided on pip's own dry-run reports before anything large is fetched.

A plain package index answers "torch" on Linux with a CUDA build and several GB of nvidia packages. Nothing here touches
the network: every function takes a report (`pip install --dry-run --report`, format version 1) and judges it.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .errors import ServeError
from .pins import KEPT_OUT, Engine

Report = Mapping[str, Any]

_NAME = re.compile(r"^\s*([A-Za-z0-9][A-Za-z0-9._-]*)")
_CUDA_NAME = re.compile(r"^(nvidia|cuda|cupy|flashinfer|tensorrt)(-|$)|-cu\d+$")
_CUDA_LOCAL = re.compile(r"^(cu\d|cuda|rocm|xpu)")


def canonical(name: str) -> str:
    """A distribution's name as the index spells it: lower case, runs of `-_.` one dash (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirement_name(requirement: str) -> str:
    """The canonical name in front of a requirement ("Foo_bar[x]>=1; python_version > '3'" -> "foo-bar")."""
    found = _NAME.match(requirement)
    return canonical(found.group(1)) if found else ""


def is_cuda_package(name: str) -> bool:
    """True for packages that exist only for an NVIDIA GPU (nvidia-*, cuda-*, …)."""
    return bool(_CUDA_NAME.search(canonical(name)))


def packages(report: Report) -> dict[str, str]:
    """Name -> version of everything that pip would install."""
    metadata = [item["metadata"] for item in report.get("install", [])]
    return {canonical(entry["name"]): str(entry["version"]) for entry in metadata}


def requirements_of(report: Report, name: str) -> list[str]:
    """What the package `name` of a report requires, without what only its extras require."""
    for item in report.get("install", []):
        if canonical(item["metadata"]["name"]) == canonical(name):
            wanted = item["metadata"].get("requires_dist") or []
            return [line for line in wanted if not re.search(r"\bextra\s*==", line)]
    raise ServeError(f"pip's report does not name {name}, which it was asked for.")


def is_cpu_build(report: Report) -> bool:
    """True if the torch that pip would fetch is a build for the CPU.

    The version's local part says so ("+cpu" against "+cu130"). Without one (a plain index) it is a CPU build only where
    it requires no CUDA package.
    """
    version = packages(report).get("torch")
    if version is None:
        return False
    local = version.partition("+")[2]
    if local:
        return local.split(".")[0] == "cpu" and not _CUDA_LOCAL.match(local)
    return not any(is_cuda_package(requirement_name(line)) for line in requirements_of(report, "torch"))


def without_kept_out(requirements: Iterable[str], engine: Engine) -> list[str]:
    """Requirements without torch itself (installed by then) and without what the engine does without on a CPU."""
    left_out = engine.kept_out | {"torch"}
    return [line for line in requirements if requirement_name(line) not in left_out]


def pinned_for_cpu(report: Report, engine: Engine) -> list[str]:
    """The report as exact pins, fit for `pip install --no-deps` on a CPU machine.

    Raises ServeError, naming them, if it holds CUDA packages or another torch; what is kept out is dropped in silence,
    because the packages that name it work without.
    """
    plan = {name: version for name, version in packages(report).items() if name not in engine.kept_out}
    wrong = sorted(name for name in plan if is_cuda_package(name) or name == "torch")
    if wrong:
        raise ServeError(
            f"On this CPU machine pip would fetch {', '.join(wrong)}, which belong to a GPU: nothing was downloaded; "
            f"check that the configured index has the packages of {requirement_name(engine.on_cpu)}."
        )
    return sorted(f"{name}=={version}" for name, version in plan.items())


def intruders(installed: Mapping[str, str], torch_version: str) -> list[str]:
    """What an environment for the CPU holds and must not: CUDA packages, kept-out ones, another torch."""
    names = [name for name in installed if is_cuda_package(name) or canonical(name) in KEPT_OUT]
    if installed.get("torch") != torch_version:
        names.append(f"torch {installed.get('torch', '(missing)')} instead of {torch_version}")
    return sorted(names)
