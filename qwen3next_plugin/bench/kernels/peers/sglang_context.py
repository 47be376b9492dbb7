"""What SGLang's kernels read of a server's settings, where there is no server."""

import functools
import os

from . import named


@functools.cache
def publish() -> None:
    """Default settings, as SGLang's own scripts for its kernels give them."""
    arguments = named("sglang.srt.server_args:ServerArgs")(model_path="dummy")
    named("sglang.srt.server_args:set_global_server_args_for_scheduler")(arguments)


def compile_no_more_than_asked() -> None:
    """Before SGLang is imported: its DeepGEMM compiles what is measured, not 16,384 numbers of rows ahead of it, which
    takes minutes for each weight."""
    os.environ.setdefault("SGLANG_JIT_DEEPGEMM_PRECOMPILE", "0")
