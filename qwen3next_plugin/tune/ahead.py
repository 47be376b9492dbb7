"""Kernels compiled on all cores before the first of them is measured, where else every measurement waits for its own.

Each config that is certain to be measured is called once while launches only hand their kernels to threads. Threads are
enough: Triton's compiler holds Python's lock for 10 of the 300 ms that a grouped product takes it.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from contextvars import copy_context
from typing import Any

from rich.console import Console

from qwen3next_plugin.kernels.dispatch import interpreting

from .measuring import in_short
from .session import Progressing
from .state import C, P

Once = Callable[[P, C], Callable[[], object]]
"""Gives a call of a config at a place, see `measuring.Machine.once`."""

_MOST_THREADS = 32  # each holds a kernel's code in all its forms


class _Pool(ThreadPoolExecutor):
    """As many threads as there are cores, and what they were given."""

    def __init__(self) -> None:
        super().__init__(min(len(os.sched_getaffinity(0)), _MOST_THREADS))
        self.futures: list[Future[Any]] = []

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        self.futures.append(super().submit(fn, *args, **kwargs))
        return self.futures[-1]


def compile_ahead(once: Once[P, C], wanted: Sequence[tuple[P, C]], console: Console) -> None:
    """Compile what the ``wanted`` configs launch at their places.

    This saves time and decides nothing: what fails here is compiled again, and refused, when it is measured.
    """
    if not wanted or interpreting():
        return
    begin, progress, pool = time.monotonic(), Progressing(console, 0), _Pool()
    try:
        with progress.bar:
            # A context of its own: after an interrupt no later launch finds the mode still on.
            copy_context().run(_compile_all, once, wanted, pool, progress)
        said = f"{len(pool.futures)} kernels compiled in {time.monotonic() - begin:.0f} s."
    except Exception as error:  # another Triton's ways
        said = f"Each kernel is compiled when it is measured ({in_short(error)})."
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    console.print(said, highlight=False, markup=False, soft_wrap=True)


def _compile_all(once: Once[P, C], wanted: Sequence[tuple[P, C]], pool: _Pool, progress: Progressing) -> None:
    from triton import AsyncCompileMode

    launched: set[Any] = set()
    failed: Exception | None = None
    mode = AsyncCompileMode(pool, ignore_errors=True)
    mode.__enter__()  # not by `with`, which after an interrupt would wait for all that was handed over
    try:
        for place, config in wanted:
            try:
                call = once(place, config)  # inputs may come from kernels that do run
                with _only_compiled(launched):
                    call()
            except Exception as error:
                failed = error
            progress.expect(f"compiling {len(pool.futures)} kernels", len(pool.futures))
        if failed is not None and not pool.futures:
            raise failed
        for _ in as_completed(pool.futures):
            progress.tick(1.0)
        mode.__exit__(None, None, None)
    finally:
        _forget_unfinished(launched)


@contextmanager
def _only_compiled(launched: set[Any]) -> Iterator[None]:
    """Launches inside compile their kernels, which are added to ``launched``, and run nothing."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compiled(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        launched.add(self)
        return run(self, *args, grid=grid, warmup=True, **options)

    JITFunction.run = compiled
    try:
        yield
    finally:
        JITFunction.run = run


def _forget_unfinished(launched: set[Any]) -> None:
    """Triton 3.7 keeps a failed compilation and raises its error at every launch. It is tried again instead: it may
    have failed for want of memory beside all the others, or been given up."""
    from triton import FutureKernel

    for kernel in launched:
        for compiled, *_ in kernel.device_caches.values():
            for key in [key for key, found in compiled.items() if isinstance(found, FutureKernel)]:
                del compiled[key]
