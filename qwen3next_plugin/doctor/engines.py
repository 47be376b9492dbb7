"""Findings about activity: what each engine would really serve, and with which settings."""

import json
from collections.abc import Iterator

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.settings import PREFIX, read_settings

from .finding import Finding, error, ok, refusal, warning
from .packages import engine_version
from .surroundings import Surroundings

INQUIRIES = {
    "vllm": "qwen3next_plugin.vllm_integration.inquiry",
    "sglang": "qwen3next_plugin.sglang_integration.inquiry",
}
_NAMES = {"vllm": "vLLM", "sglang": "SGLang"}
# Importing an engine takes 10 s on a quiet machine, and minutes from a cold network disk.
TIMEOUT = 300.0


def settings(s: Surroundings) -> Iterator[Finding]:
    """The QWEN3NEXT_* variables, read as an engine process reads them."""
    try:
        chosen = read_settings(s.environ)
    except PluginError as refused:
        yield refusal("settings", str(refused))
        return
    if not chosen.enabled:
        found = "QWEN3NEXT_PLUGIN=0: the kill switch is set, and engines serve their own model"
        yield warning("settings", found, "unset QWEN3NEXT_PLUGIN")
        return
    interpreted = s.environ.get("TRITON_INTERPRET") == "1"
    if chosen.kernels == "triton" and not s.has_gpu and not interpreted:
        yield error("settings", "QWEN3NEXT_KERNELS is triton and there is no NVIDIA GPU", "use auto or reference")
    if interpreted:
        found = "TRITON_INTERPRET=1: every Triton kernel runs in the interpreter, thousands of times slower"
        yield warning("settings", found, "unset TRITON_INTERPRET")
    given = [f"{name}={value}" for name, value in sorted(s.environ.items()) if name.startswith(PREFIX)]
    yield ok("settings", ", ".join(given) or "all at their defaults")


def vllm_activity(s: Surroundings) -> Iterator[Finding]:
    """Which class vLLM would serve."""
    yield from _activity(s, "vllm", {})


def sglang_activity(s: Surroundings) -> Iterator[Finding]:
    """Which class SGLang would serve; without a GPU it has to be told that it is on a CPU."""
    yield from _activity(s, "sglang", {} if s.has_gpu else {"SGLANG_USE_CPU_ENGINE": "1"})


def _activity(s: Surroundings, engine: str, variables: dict[str, str]) -> Iterator[Finding]:
    """Which class an engine would serve, asked of it in a process of its own; `variables` where the user set none."""
    version = engine_version(s, engine)
    if version is None:
        return
    # -P: no folder of the caller's comes first, as for the engine's own command.
    outcome = s.run([s.python, "-P", "-m", INQUIRIES[engine]], TIMEOUT, variables)
    answer = _answer(outcome.stdout, INQUIRIES[engine])
    found, kind = answer.get("found", ""), answer.get("kind")
    if kind == "active":
        yield ok(engine, f"{version} is active: Qwen3NextForCausalLM is {found}")
    elif kind == "refused":
        yield refusal(engine, found)
    elif kind == "stock" and s.environ.get("QWEN3NEXT_PLUGIN") == "0":
        yield warning(engine, f"{version} is stock: Qwen3NextForCausalLM is {found}", "unset QWEN3NEXT_PLUGIN")
    elif kind == "stock":
        why = _logged_error(outcome.stderr + outcome.stdout)
        found = f"{version} is stock: Qwen3NextForCausalLM is {found}" + (f" ({why})" if why else "")
        remedy = f"see the entry point findings above, and what {_NAMES[engine]} logs at its start"
        yield error(engine, found, remedy)
    else:
        why = (
            found
            or _logged_error(outcome.stderr)
            or outcome.stderr.strip()
            or f"its process ended with {outcome.returncode}"
        )
        remedy = f"if QWEN3NEXT_PLUGIN=0 does not change it, install {_NAMES[engine]} again in a fresh environment"
        yield error(engine, f"{version} cannot load its model classes: {why}", remedy)


def _answer(stdout: str, inquiry: str) -> dict[str, str]:
    for line in reversed(stdout.splitlines()):
        if line.startswith(inquiry):
            answer = json.loads(line.removeprefix(inquiry))
            return answer if isinstance(answer, dict) else {}
    return {}


def _logged_error(text: str) -> str:
    """The last line that names an exception; engines log one if a plugin fails, and go on without it."""
    return next((line.strip() for line in reversed(text.splitlines()) if "Error: " in line), "")
