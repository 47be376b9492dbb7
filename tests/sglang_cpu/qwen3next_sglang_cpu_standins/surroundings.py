"""What SGLang takes for granted of a machine with a GPU, and how it is made to do without."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch


class _WithStates:
    """A platform of which everything else is as it is, and of which SGLang thinks that states can be copied on it."""

    is_cuda = True

    def __init__(self, platform: Any) -> None:
        self._platform = platform

    def __getattr__(self, name: str) -> Any:
        return getattr(self._platform, name)


def validate_mamba_extra_buffer(original: Callable[..., None], *given: Any, **options: Any) -> None:
    """AROUND SGLang's check of the ``extra_buffer`` strategies: all of it but that it wants a GPU.

    The check asks for a GPU because it copies states with Triton; `ops.states` copies them here.
    """
    from sglang.srt.arg_groups import mamba_hook

    platform = _WithStates(mamba_hook.get_platform())
    with mock.patch.object(mamba_hook, "get_platform", lambda: platform):
        original(*given, **options)


def do_without_pinned_memory() -> None:
    """SGLang pins host memory and empties CUDA caches without asking whether there is a GPU."""

    def unpinned(function: Callable[..., Any]) -> Callable[..., Any]:
        def make(*arguments: Any, pin_memory: bool = False, **options: Any) -> Any:
            return function(*arguments, **options)

        return make

    for name in ("tensor", "empty", "zeros"):
        if getattr(getattr(torch, name), "__name__", "") != "make":
            setattr(torch, name, unpinned(getattr(torch, name)))
    torch.Tensor.pin_memory = lambda self, *arguments, **options: self  # type: ignore[method-assign]
    torch.cuda.empty_cache = torch.cuda.synchronize = lambda *arguments: None
