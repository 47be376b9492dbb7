"""How each engine is started: the same flags for stock and plugin, and an environment that differs in one variable."""

import json
import os
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.synthetic_names import LOAD_FORMAT, SGLANG_FLAGS

from .rows import Engine, Side

MODEL_NAME = "bench"

SIDE_VARIABLE = "QWEN3NEXT_PLUGIN"
"""The one variable in which the two sides differ."""

KEPT_PREFIXES = (
    "CUDA_",
    "DG_",
    "FLASHINFER_",
    "LD_PRELOAD",
    "MKL_",
    "NCCL_",
    "OMP_",
    "PYTORCH_",
    "QWEN3NEXT_",
    "SGLANG_",
    "SGL_",
    "TORCH",
    "TRITON_",
    "TVM_",
    "VLLM_",
)
"""Variables that a result file keeps: those that can change speed. Nothing else of the environment is written down."""

# Where compilers and engines keep what they made: one folder a side, so that a cold start is cold.
_CACHES = {
    "CUDA_CACHE_PATH": "nv",
    "DG_JIT_CACHE_DIR": "deep_gemm",
    "FLASHINFER_WORKSPACE_BASE": "flashinfer",
    "SGLANG_CACHE_DIR": "sglang",
    "SGLANG_DG_CACHE_DIR": "deep_gemm",
    "SGLANG_JIT_CACHE_DIR": "sglang_jit",  # in the home folder otherwise, whatever SGLANG_CACHE_DIR says
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "TVM_FFI_CACHE_DIR": "tvm_ffi",
    "VLLM_CACHE_ROOT": "vllm",
    "XDG_CACHE_HOME": "xdg",
}


@dataclass(frozen=True)
class EngineSetup:
    """Where an engine is installed and what it is given on top: the same for both sides.

    Args:
        python: the interpreter that has it.
        environment_file: a shell file to be sourced before it, or None.
        arguments: more flags.
        environment: more variables.
    """

    python: str = sys.executable
    environment_file: Path | None = None
    arguments: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def variables(self) -> dict[str, str]:
        """The environment that engine processes start from: this process's, and what the file sets."""
        base = {name: value for name, value in os.environ.items() if not name.startswith("QWEN3NEXT_")}
        if self.environment_file is not None:
            command = ["bash", "-c", f"set -a; . {shlex.quote(str(self.environment_file))}; env -0"]
            done = subprocess.run(command, env=base, capture_output=True, check=False)
            if done.returncode:
                raise SettingsError(f"{self.environment_file} cannot be sourced: {done.stderr.decode()[:300]}")
            base = dict(pair.split("=", 1) for pair in done.stdout.decode().split("\0") if "=" in pair)
        return base | dict(self.environment)


@dataclass(frozen=True)
class Limits:
    """What both sides must hold: the longest request, the most requests at once, and the prefill chunk."""

    context: int
    requests: int
    chunk: int = 8192


def command_of(side: Side, setup: EngineSetup, model: Path, limits: Limits, port: int, *, eager: bool) -> list[str]:
    """The server's full command line. ``eager``: without graphs and compilation, for counting experts."""
    flags = _vllm(model, limits, eager) if side.engine == "vllm" else _sglang(model, limits, eager)
    return [setup.python, *flags, "--host", "127.0.0.1", "--port", str(port), *setup.arguments]


def _vllm(model: Path, limits: Limits, eager: bool) -> list[str]:
    flags = ["-m", "vllm.entrypoints.openai.api_server", "--model", str(model), "--load-format", LOAD_FORMAT]
    flags += ["--served-model-name", MODEL_NAME, "--max-model-len", str(limits.context)]
    flags += ["--max-num-seqs", str(limits.requests), "--max-num-batched-tokens", str(limits.chunk)]
    flags += ["--no-enable-prefix-caching"]
    return flags + ["--enforce-eager"] * eager


def _sglang(model: Path, limits: Limits, eager: bool) -> list[str]:
    flags = ["-m", "sglang.launch_server", "--model-path", str(model), *SGLANG_FLAGS]
    flags += ["--served-model-name", MODEL_NAME, "--context-length", str(limits.context)]
    flags += ["--max-running-requests", str(limits.requests), "--chunked-prefill-size", str(limits.chunk)]
    flags += ["--disable-radix-cache", "--cuda-graph-max-bs-decode", str(limits.requests)]
    return flags + ["--disable-prefill-cuda-graph", "--disable-decode-cuda-graph"] * eager


def environment_of(
    side: Side, setup: EngineSetup, caches: Path, record: Path, *, experts: bool = False
) -> dict[str, str]:
    """The server's environment: caches of its own below ``caches``, records below ``record``."""
    mine = {name: str(caches / folder) for name, folder in _CACHES.items()}
    mine |= {SIDE_VARIABLE: "1" if side.plugin else "0", "QWEN3NEXT_RECORD": str(record)}
    mine |= {"QWEN3NEXT_RECORD_EXPERTS": "1"} if experts else {}
    fixed = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "PYTHONUNBUFFERED": "1"}
    return setup.variables() | fixed | mine


def told(command: Sequence[str], environment: Mapping[str, str], places: Mapping[str, str]) -> dict[str, object]:
    """Command and environment as a result file keeps them, with ``places`` (path -> what it stands for) replaced."""

    def plain(text: str) -> str:
        for path in sorted(places, key=len, reverse=True):
            text = text.replace(path, f"<{places[path]}>")
        return text

    arguments = [plain(part) for part in command[1:]]
    if "--port" in arguments:
        arguments[arguments.index("--port") + 1] = "<port>"
    kept = {name: plain(value) for name, value in sorted(environment.items()) if name.startswith(KEPT_PREFIXES)}
    return {"arguments": arguments, "environment": kept}


def words_of(text: str) -> list[str]:
    """Words as a shell splits them, but an unquoted JSON object is one word as it stands, its quotes kept.

    A flag such as ``--compilation-config {"cudagraph_capture_sizes":[1]}`` stands in quotes already, and a shell's
    rules would take those of JSON away. Raises SettingsError for a quote that is not closed.
    """
    words: list[str] = []
    while text := text.lstrip():
        if text.startswith("{"):
            try:
                end = json.JSONDecoder().raw_decode(text)[1]
            except ValueError:  # quoted for a shell, as with backslashes
                end = 0
            if end and (end == len(text) or text[end].isspace()):
                words.append(text[:end])
                text = text[end:]
                continue
        rest = StringIO(text)
        split = shlex.shlex(rest, posix=True)
        split.whitespace_split, split.commenters = True, ""
        try:
            words.append(split.get_token() or "")
        except ValueError as error:
            raise SettingsError(f"flags: {text[:80]!r}: {error}.") from error
        text = rest.read()
    return words


def engines_of(text: str) -> list[Engine]:
    """Engines of ``--engine``. Raises SettingsError for anything but vllm, sglang or both."""
    known: dict[str, list[Engine]] = {"vllm": ["vllm"], "sglang": ["sglang"], "both": ["vllm", "sglang"]}
    if text not in known:
        raise SettingsError(f"--engine: {text!r} is not known: use vllm, sglang or both.")
    return known[text]
