"""Kernels are compiled before SGLang captures its graphs, and what is compiled later is told of."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from sglang.srt.runtime_context import get_exec
from torch import nn

from qwen3next_plugin.kernels.gdn import DraftRecords, gdn_commit
from qwen3next_plugin.settings import read_settings
from qwen3next_plugin.warmup import Serving, WarmUp, serve, warm_up
from qwen3next_plugin.warmup_rows import SkippedRows, StepRows

from .checks import is_qwen3_next
from .gdn_layer import Qwen3NextGdnLayer

logger = logging.getLogger("sglang.qwen3next_plugin")

_TOKENS_OF_A_STEP = ("chunked_prefill_size", "max_prefill_tokens")


def init_cuda_graphs(original: Callable[..., None], runner: Any, *args: Any, **kwargs: Any) -> None:
    """Around ModelRunner.init_cuda_graphs, the last that SGLang does to a runner, with graphs or without.

    It is called for the model first, then for its drafter, if any. Both have the states of one pool.
    """
    if not is_qwen3_next(runner.model_config) or not read_settings().warm_up:
        original(runner, *args, **kwargs)
        return
    warmed = warm(runner)
    if warmed.layers:
        logger.info("%s", warmed)
    original(runner, *args, **kwargs)
    serve(logger, warmed)


def warm(runner: Any) -> WarmUp:
    """Compiles what the runner's model will launch; its pool and arguments say which steps there will be."""
    pool, model = runner.req_to_token_pool, runner.model
    device = next(model.parameters()).device
    rows = SkippedRows(device)
    records: DraftRecords | None = getattr(pool.mamba_pool, "draft_records", None)
    recurrent = any(isinstance(module, Qwen3NextGdnLayer) for module in model.modules())

    def states(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
        if not isinstance(layer, Qwen3NextGdnLayer):
            return None
        cache = pool.mamba2_layer_cache(layer.attn.layer_id)
        return cache.conv[0], cache.temporal

    tokens = records.inputs.shape[2] if records is not None else 1
    sizes = [getattr(runner.server_args, name, None) or 0 for name in _TOKENS_OF_A_STEP]
    serving = Serving(
        dtype=runner.model_config.dtype,
        device=device,
        max_tokens=max(*sizes, pool.size * tokens),
        top_k=model.spec.moe.top_k,
        states=states,
        steps=lambda layer: _steps(rows, records),
        further=list(_commits(rows, pool, records)) if recurrent else (),
    )
    return warm_up([model], serving)


def _kept() -> tuple[bool, ...]:
    """Whether steps keep states for the radix tree besides: with its extra buffer some do, and some do not."""
    return (False, True) if get_exec().mamba.enable_mamba_extra_buffer else (False,)


def _steps(rows: SkippedRows, records: DraftRecords | None) -> Iterator[StepRows]:
    """Every kind of rows that the backend makes."""
    for kept in _kept():
        yield {"prefill": rows.prefill(kept)}
        yield {"recurrent": rows.decode(kept)}
    if records is not None:
        for tokens in _lengths(records.inputs.shape[2]):
            yield {"drafts": (rows.drafts(tokens), records.layer(0))}


def _lengths(most: int) -> list[int]:
    """Tokens of a row for which a kernel is compiled each: the powers of two up to `most`, and `most`.

    SGLang may verify fewer drafts than it has room for (--speculative-adaptive).
    """
    return sorted({most, *(2**power for power in range(most.bit_length()))})


def _commits(rows: SkippedRows, pool: Any, records: DraftRecords | None) -> Iterator[Callable[[], None]]:
    if records is None:
        return
    cache = pool.mamba_pool.mamba_cache
    for dtype in (torch.int32, torch.int64):  # of tokens, as the ways to verify count them
        commit = partial(gdn_commit, cache.conv[0], cache.temporal, records)
        commit = partial(commit, state_slots=rows.slots(), last_tokens=rows.slots(dtype=dtype))
        for kept in _kept():
            tracked = {"snapshot_slots": rows.slots(dtype=torch.int64), "snapshot_tokens": rows.slots(dtype=dtype)}
            yield partial(commit, **(tracked if kept else {}))
