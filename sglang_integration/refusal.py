"""How this plugin says no once SGLang runs its hooks: one sentence, and no server half started."""

from __future__ import annotations

import multiprocessing
from typing import NoReturn

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.refusal import end_with, is_command


def refuse(error: PluginError) -> NoReturn:
    """Ends SGLang's commands and its child processes with the error's sentence; raises the error in other programs.

    SGLang's main process takes the others with it when it ends, and ends itself when a child does.
    """
    if is_command("sglang") or multiprocessing.parent_process() is not None:
        end_with(error)
    raise error
