"""Attention of draft and verify steps by SGLang's ``torch_native`` backend, which knows prefill and decode only."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def forward_extend(
    original: Callable[..., Any], self: Any, q: Any, k: Any, v: Any, layer: Any, batch: Any, *more: Any, **options: Any
) -> Any:
    """AROUND ``TorchNativeAttnBackend.forward_extend``: a verify batch is a prefill of its drafts behind each sequence.

    SGLang leaves the prefill's lengths empty there; they are set for the call and put back.
    """
    if not batch.forward_mode.is_target_verify():
        return original(self, q, k, v, layer, batch, *more, **options)
    drafts = batch.spec_info.draft_token_num
    saved = batch.seq_lens, batch.extend_prefix_lens, batch.extend_seq_lens
    batch.extend_prefix_lens, batch.extend_seq_lens = batch.seq_lens, torch.full_like(batch.seq_lens, drafts)
    batch.seq_lens = batch.seq_lens + drafts
    try:
        return original(self, q, k, v, layer, batch, *more, **options)
    finally:
        batch.seq_lens, batch.extend_prefix_lens, batch.extend_seq_lens = saved


def _native_backend(runner: Any, step: int | None = None) -> Any:
    """A ``torch_native`` backend; with ``step`` it decodes for the draft's step of that number, so many tokens on."""
    from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend

    class Step(TorchNativeAttnBackend):
        def forward_decode(self, q: Any, k: Any, v: Any, layer: Any, batch: Any, *more: Any, **options: Any) -> Any:
            saved, batch.seq_lens = batch.seq_lens, batch.seq_lens + step + 1
            try:
                return super().forward_decode(q, k, v, layer, batch, *more, **options)
            finally:
                batch.seq_lens = saved

    backend = TorchNativeAttnBackend(runner) if step is None else Step(runner)
    backend.prefill_attention_backend_str = backend.decode_attention_backend_str = "torch_native"
    return backend


class DraftSteps:
    """What SGLang expects for a chain of drafts: one backend a step."""

    def __init__(self, runner: Any, steps: int) -> None:
        self.attn_backends = [_native_backend(runner, step) for step in range(steps)]

    def init_forward_metadata(self, forward_batch: Any, *more: Any, **options: Any) -> None:
        """Passed on to every step."""
        for backend in self.attn_backends:
            backend.init_forward_metadata(forward_batch)


def create_decode_backend(self: Any) -> DraftSteps | None:
    """In place of ``DraftBackendFactory.create_decode_backend``, whose map has no ``torch_native``."""
    steps = self.speculative_num_steps
    return None if steps <= 1 else DraftSteps(self.draft_model_runner, steps)


def create_draft_extend_backend(self: Any) -> Any:
    """In place of ``DraftBackendFactory.create_draft_extend_backend``, for the same reason."""
    return _native_backend(self.draft_model_runner)
