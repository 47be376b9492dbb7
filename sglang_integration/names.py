"""Where SGLang keeps a process's settings and ranks: one place to follow when its versions move them."""

from __future__ import annotations

from sglang.srt.runtime_context import get_model, get_parallel, get_spec

__all__ = ["get_model", "get_parallel", "get_spec"]
