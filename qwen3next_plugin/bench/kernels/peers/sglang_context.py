"""What SGLang's kernels read of a server's settings, where there is no server."""

import functools

from . import named


@functools.cache
def publish() -> None:
    """Default settings, as SGLang's own scripts for its kernels give them."""
    arguments = named("sglang.srt.server_args:ServerArgs")(model_path="dummy")
    named("sglang.srt.server_args:set_global_server_args_for_scheduler")(arguments)
