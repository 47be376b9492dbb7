"""How this plugin says no: one sentence and a non-zero exit for a command, an exception for a program."""

from __future__ import annotations

from typing import NoReturn

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.refusal import end_with, is_command


def refuse(error: PluginError) -> NoReturn:
    """Ends `vllm serve` with the error's sentence alone on standard error; raises the error inside other programs."""
    if is_command("vllm"):
        end_with(error)
    raise error
