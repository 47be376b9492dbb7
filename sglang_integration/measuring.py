"""What `qwen3next bench` needs inside SGLang, the same for stock and plugin: synthetic weights and the engine's clock.

None of these hooks touches a model, a kernel or a cache. One that SGLang could not apply is noticed: without the loader
its dummy loader refuses the flags, and `qwen3next bench` misses the steps and facts of a server that writes none.
"""

from __future__ import annotations

import functools
from typing import Any

from qwen3next_plugin.recording import Recorder, recorder, records_experts
from qwen3next_plugin.synthetic_names import LOAD_FORMAT

_LOADER = "sglang.srt.model_loader.loader.get_model_loader"
_SCHEDULER = "sglang.srt.managers.scheduler.Scheduler"


@functools.cache
def offer() -> None:
    """Makes synthetic weights known, and writes down steps where ``QWEN3NEXT_RECORD`` asks for it."""
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    HookRegistry.register(_LOADER, _synthetic_where_asked, HookType.AROUND)
    record = recorder()
    if record is not None:
        HookRegistry.register(f"{_SCHEDULER}.__init__", functools.partial(_started, record), HookType.AFTER)
        HookRegistry.register(f"{_SCHEDULER}.process_batch_result", functools.partial(_step, record), HookType.AFTER)


def _synthetic_where_asked(original: Any, load_config: Any, *args: Any, **kwargs: Any) -> Any:
    extra = getattr(load_config, "model_loader_extra_config", None)
    if isinstance(extra, dict) and extra.get("weights") == LOAD_FORMAT:
        from .synthetic import SyntheticModelLoader

        return SyntheticModelLoader(load_config)
    return original(load_config, *args, **kwargs)


def _step(record: Recorder, result: Any, scheduler: Any, batch: Any, *_: Any) -> None:
    """Called when a batch's tokens have been taken in, with the batch as it ran."""
    requests = len(batch.reqs)
    mode = batch.forward_mode
    if not requests or mode.is_idle():
        return
    if mode.is_decode():
        algorithm = scheduler.spec_algorithm
        drafts = 1 if algorithm is None or algorithm.is_none() else scheduler.server_args.speculative_num_draft_tokens
        record.step(requests, requests * drafts, drafts)
    else:
        tokens = getattr(batch, "extend_num_tokens", None) or 2 * requests
        record.step(requests, int(tokens), max(2, -(-int(tokens) // requests)))


def _started(record: Recorder, result: Any, scheduler: Any, *_: Any, **__: Any) -> None:
    runner = scheduler.tp_worker.model_runner
    record.facts(**_facts(scheduler, runner))
    if records_experts():
        record.watch_routers(runner.model, runner.model_config.hf_text_config.num_experts_per_tok)


def _facts(scheduler: Any, runner: Any) -> dict[str, Any]:
    arguments, model = scheduler.server_args, type(runner.model)
    facts: dict[str, Any] = {
        "model_class": f"{model.__module__}.{model.__qualname__}",
        "dtype": str(runner.model_config.dtype),
        "kv_dtype": str(runner.kv_cache_dtype),
        "quantization": runner.model_config.quantization,
        "attention_backends": [
            getattr(runner, f"{phase}_attention_backend_str", None) for phase in ("prefill", "decode")
        ],
        "overlap": scheduler.enable_overlap,
        "max_num_seqs": scheduler.max_running_requests,
        "max_num_batched_tokens": arguments.chunked_prefill_size,
        "prefix_caching": not arguments.disable_radix_cache,
        "page_size": arguments.page_size,
        "moe_runner_backend": arguments.moe_runner_backend,
        "shared_experts_fusion": not arguments.disable_shared_experts_fusion,
        "graph_mode": "/".join(
            type(getattr(runner, f"{phase}_cuda_graph_runner", None)).__name__ for phase in ("prefill", "decode")
        ),
    }
    pool = getattr(runner.req_to_token_pool, "mamba_pool", None)
    cache = getattr(pool, "mamba_cache", None)
    if cache is not None:
        facts |= {"conv_state_dtype": str(cache.conv[0].dtype), "ssm_state_dtype": str(cache.temporal.dtype)}
    return facts
