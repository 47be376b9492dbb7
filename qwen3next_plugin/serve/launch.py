"""How each engine is started: its command, and the variables it gets."""

import os
from collections.abc import Mapping
from pathlib import Path

from . import machine
from .errors import ServeError
from .settings import NAMES, Settings

CPU_CACHE_GIB = "VLLM_CPU_KVCACHE_SPACE"
HOST = "127.0.0.1"

# Left alone, SGLang's scheduler keeps a core busy even when nobody asks anything.
_SGLANG_ON_CPU = (
    *("--device", "cpu", "--attention-backend", "torch_native", "--mem-fraction-static", "0.3"),
    "--sleep-on-idle",
)
# Left alone, SGLang makes room for tens of thousands of states of the demo model, which takes seconds and GiB.
_SGLANG_DEMO_ON_CPU = ("--max-total-tokens", "8192", "--max-mamba-cache-size", "64", "--max-running-requests", "8")


def command(settings: Settings, python: Path, device: str, model: str) -> list[str | Path]:
    """The engine's own command; what the user gave in ARGS comes last, and so wins.

    Raises ServeError if the engine is not in the environment of `python`.
    """
    where = ["--host", HOST, "--port", str(settings.port)]
    demo = settings.model is None
    named = ["--served-model-name", "demo"] if demo else []
    if settings.engine.product == "vllm":
        program = _installed(python, "vllm")
        return [program, "serve", model, *where, *named, *settings.engine_arguments]
    _installed(python, "sglang")
    of_device = [*_SGLANG_ON_CPU, *(_SGLANG_DEMO_ON_CPU if demo else ())] if device == "cpu" else []
    launch = [python, "-m", "sglang.launch_server", "--model-path", model]
    return [*launch, *where, *of_device, *named, *settings.engine_arguments]


def _installed(python: Path, program: str) -> Path:
    path = python.with_name(program)
    if not path.exists():
        raise ServeError(f"{program} is not installed beside {python}.")
    return path


def defaults(settings: Settings, device: str) -> dict[str, str]:
    """Variables that the engine gets where the user has not set them; they are shown before its command."""
    if settings.engine.product == "sglang":
        # The checkout's folder `kernels` must not be taken for the package of that name, which SGLang imports.
        safe = {"PYTHONSAFEPATH": "1"}
        # Drafting compiles a helper of a few lines on its first use, for half a minute.
        return safe | ({"SGLANG_USE_CPU_ENGINE": "1", "TORCHDYNAMO_DISABLE": "1"} if device == "cpu" else {})
    if device == "cpu" and not any(part.startswith("--kv-cache-memory") for part in settings.engine_arguments):
        # Left alone, vLLM takes nearly all memory for the cache and refuses to start if another program uses some.
        available = 4 if settings.model is None else machine.available_memory_gib()
        return {CPU_CACHE_GIB: str(max(1, int(available / 4)))}
    return {}


def variables(settings: Settings, python: Path, device: str, environ: Mapping[str, str]) -> dict[str, str]:
    """The engine's variables: the user's, without make's and ours, and with the environment's programs found first."""
    of_make = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "MAKE_TERMOUT", "MAKE_TERMERR", *NAMES}
    env = {name: value for name, value in environ.items() if name not in of_make}
    env["PATH"] = f"{python.parent}{os.pathsep}{env.get('PATH', os.defpath)}"
    return defaults(settings, device) | env
