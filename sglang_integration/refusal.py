"""How this plugin says no inside SGLang: one sentence, and no server half started."""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import NoReturn, ParamSpec, TypeVar

from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.refusal import EXIT_CODE, end_with, is_command, say

_Parameters = ParamSpec("_Parameters")
_Result = TypeVar("_Result")


def refusing(function: Callable[_Parameters, _Result]) -> Callable[_Parameters, _Result]:
    """The function, refusing what this package raises in it; other exceptions pass as they are."""

    @functools.wraps(function)
    def refuses(*args: _Parameters.args, **kwargs: _Parameters.kwargs) -> _Result:
        try:
            return function(*args, **kwargs)
        except PluginError as error:
            refuse(error)

    return refuses


def refuse(error: PluginError) -> NoReturn:
    """Ends SGLang's commands and its child processes with the error's sentence; raises the error in other programs."""
    if is_command("sglang") or multiprocessing.parent_process() is not None:
        end(error)
    raise error


def end(error: PluginError) -> NoReturn:
    """Ends this process with the error's sentence, and with it the command that started it.

    SGLang's commands end, with all of their children, at a SIGQUIT from one of them, which is how a child tells of an
    exception after logging its traceback. Over a child that has just gone they end with a traceback of their own, about
    its exit code. So does an ``Engine``, and the program that made it may go on.
    """
    parent = multiprocessing.parent_process()
    if parent is None or parent.pid is None:
        end_with(error)
    print(file=sys.stderr)  # the line may hold the progress bar of the weights
    say(error)
    if is_command("sglang"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(parent.pid, signal.SIGQUIT)
    raise SystemExit(EXIT_CODE) from error
