"""SGLang's names that this folder uses and that moved between the supported versions, resolved in one place."""

from __future__ import annotations

from typing import Any

from sglang.srt.runtime_context import get_model, get_parallel, get_spec

__all__ = ["get_model", "get_parallel", "get_spec", "tensor_parallel"]


def tensor_parallel() -> tuple[int, int]:
    """(rank, size) of this process in the tensor-parallel group that holds the layer being built."""
    parallel: Any = get_parallel()
    return parallel.tp_rank, parallel.tp_size
