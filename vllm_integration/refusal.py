"""How this plugin says no: one sentence and a non-zero exit for a command, an exception for a program."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NoReturn

from qwen3next_plugin.errors import PluginError

EXIT_CODE = 2


def refuse(error: PluginError) -> NoReturn:
    """Ends `vllm serve` with the error's sentence alone on standard error; raises the error inside other programs."""
    if _is_vllm_command():
        print(f"qwen3next-plugin: {error}", file=sys.stderr, flush=True)
        raise SystemExit(EXIT_CODE)
    raise error


def _is_vllm_command() -> bool:
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == "vllm" or (spec is not None and (spec.name or "").startswith("vllm."))
