"""All checks, in the order in which their findings are shown."""

from collections.abc import Iterator

from . import checkpoint, engines, machine, names, packages
from .finding import Check, Finding, warning
from .surroundings import Surroundings

CHECKS: tuple[Check, ...] = (
    packages.installed,
    packages.engines,
    packages.pins,
    packages.transformers,
    packages.companions,
    machine.device,
    packages.cuda_without_gpu,
    packages.cpu_beside_gpu,
    packages.driver,
    machine.compiler,
    packages.vllm_command,
    packages.sglang_parts,
    engines.settings,
    names.entry_points,
    names.allow_lists,
    names.other_copies,
    names.console_script,
    engines.vllm_activity,
    engines.sglang_activity,
    checkpoint.full_attention_interval,
    checkpoint.rope_theta,
    checkpoint.fits,
    checkpoint.complete,
)


def examine(s: Surroundings, checks: tuple[Check, ...] = CHECKS) -> Iterator[Finding]:
    """Every finding, as it is made. A check that fails itself is a finding too: the others still have their say."""
    for check in checks:
        try:
            yield from check(s)
        except Exception as broken:
            found = f"the check {check.__name__} failed ({type(broken).__name__}: {broken})"
            yield warning("doctor", found, "please report this line with the output of pip list")
