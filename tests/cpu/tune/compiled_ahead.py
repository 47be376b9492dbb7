"""Compile the experts' kernels ahead for a GPU that is not there, some of which cannot be, and print as JSON what was
seen. Run as a process of its own, without TRITON_INTERPRET, with 90 as argument.
"""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
import triton
from rich.console import Console
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from qwen3next_plugin.kernels.moe import triton as moe
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile, forced
from qwen3next_plugin.kernels.moe.triton.grouped import _grouped_kernel
from qwen3next_plugin.tune.ahead import compile_ahead
from tests.kernels.compile_layers import NamesTargetOnly, compile_only

DOWN = Tile(64, 32, 4, 2)
GOOD = [MoeConfig(16, Tile(columns, 32, 4, 2), DOWN) for columns in (32, 64)]
BAD = MoeConfig(16, Tile(64, 48, 4, 2), DOWN)  # not a power of two
OTHER = MoeConfig(32, Tile(32, 32, 4, 2), DOWN)


def once(tokens: int, config: MoeConfig) -> Callable[[], object]:
    """A call of the mixture in bfloat16."""
    x, w13, w2 = (torch.zeros(*shape, dtype=torch.bfloat16) for shape in ((tokens, 64), (4, 128, 64), (4, 64, 64)))
    weights, ids = torch.zeros(tokens, 2), torch.zeros(tokens, 2, dtype=torch.int32)

    def call() -> torch.Tensor:
        with forced(config):
            return moe.fused_moe(x, w13, w2, weights, ids, None, None, False)

    return call


def interrupted(tokens: int, config: MoeConfig) -> Callable[[], object]:
    """The same, in the middle of which comes a Ctrl-C."""
    call = once(tokens, config)

    def killed() -> None:
        call()
        os.kill(os.getpid(), signal.SIGINT)

    return killed


def main() -> None:
    """The driver launches nothing: what is not only compiled fails."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job begins with it ignored
    driver.set_active(NamesTargetOnly())
    in_threads, finished = set(), []

    def listener(**event: Any) -> None:
        in_threads.add(threading.current_thread() is not threading.main_thread())

    def hook(**event: Any) -> None:
        finished.append(event["fn"].name)

    triton.knobs.compilation.listener = listener
    triton.knobs.runtime.jit_post_compile_hook = hook
    console = Console(stderr=True)
    compile_ahead(once, [(tokens, config) for tokens in (9, 40) for config in (*GOOD, BAD)], console)
    found: dict[str, Any] = {"ahead": sorted(finished), "in_threads": sorted(in_threads)}
    ((compiled, *_),) = _grouped_kernel.device_caches.values()
    found["unfinished"] = sum(isinstance(kernel, triton.FutureKernel) for kernel in compiled.values())

    finished.clear()
    try:
        compile_ahead(interrupted, [(9, OTHER)], console)
    except KeyboardInterrupt:
        found["interrupted"] = list(finished)
    try:
        once(9, GOOD[0])()
    except AttributeError as error:
        found["launches_again"] = "launcher_cls" in str(error)
    JITFunction.run = compile_only(JITFunction.run)
    finished.clear()
    for tokens in (9, 40):
        for config in GOOD:
            once(tokens, config)()
    found["when_measured"] = list(finished)
    try:
        once(9, BAD)()
    except Exception as error:
        found["refused"] = type(error).__name__
    once(9, OTHER)()
    found["after_the_interrupt"] = sorted(set(finished))
    print(json.dumps(found))
    sys.stdout.flush()


if __name__ == "__main__":
    main()
