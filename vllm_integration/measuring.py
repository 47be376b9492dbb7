"""What `qwen3next bench` needs inside vLLM, the same for stock and plugin: synthetic weights and the engine's clock."""

from __future__ import annotations

import functools
from importlib import import_module
from typing import Any

from qwen3next_plugin.imports import when_imported
from qwen3next_plugin.recording import Recorder, recorder, records_experts

_MARK = "_qwen3next_watched"


def offer() -> None:
    """Makes the synthetic load format known, and writes down steps where ``QWEN3NEXT_RECORD`` asks for it."""
    _offer_synthetic_weights()
    record = recorder()
    if record is not None:
        _watch_scheduler(record)
        _watch_workers(record)


@functools.cache
def _offer_synthetic_weights() -> None:
    """vLLM keeps load formats in a module that only processes with a model import, and that takes a second."""
    when_imported("vllm.model_executor.model_loader", _register_synthetic_loader)


def _register_synthetic_loader() -> None:
    import_module(f"{__package__}.synthetic")


def _watch_scheduler(record: Recorder) -> None:
    from vllm.v1.core.sched.scheduler import Scheduler

    original = Scheduler.update_from_output
    if _is_watched(original):
        return

    @functools.wraps(original)
    def update_from_output(self: Any, scheduler_output: Any, model_runner_output: Any) -> Any:
        tokens = scheduler_output.num_scheduled_tokens
        if tokens:
            record.step(len(tokens), scheduler_output.total_num_scheduled_tokens, max(tokens.values()))
        return original(self, scheduler_output, model_runner_output)

    Scheduler.update_from_output = _watched(update_from_output)


def _watch_workers(record: Recorder) -> None:
    worker = _worker()
    original = worker.compile_or_warm_up_model
    if not _is_watched(original):
        worker.compile_or_warm_up_model = _watched(_observed(original, record))


def _watched(wrapper: Any) -> Any:
    vars(wrapper)[_MARK] = True
    return wrapper


def _is_watched(function: Any) -> bool:
    """Whether a wrapper of ours is there already, by its own mark, which wrappers around it copy.

    ``__wrapped__`` would not do: vLLM sets it too, on functions that it traces where OpenTelemetry is installed.
    """
    return _MARK in vars(function)


def _worker() -> Any:
    """The class of this platform's worker. Importing the CPU's replaces torch.cuda's streams and events for good."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        from vllm.v1.worker.cpu_worker import CPUWorker

        return CPUWorker
    from vllm.v1.worker.gpu_worker import Worker

    return Worker


def _observed(original: Any, record: Recorder) -> Any:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        result = original(self)
        record.facts(**_facts(self))
        if records_experts():
            model = self.model_runner.get_model()
            record.watch_routers(model, self.vllm_config.model_config.hf_text_config.num_experts_per_tok)
        return result

    return compile_or_warm_up_model


def _facts(worker: Any) -> dict[str, Any]:
    config, runner = worker.vllm_config, worker.model_runner
    model = type(runner.get_model())
    compilation = config.compilation_config
    dtypes: dict[str, str] = {}
    for group in runner.kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        if hasattr(spec, "dtypes"):
            dtypes |= {"conv_state_dtype": str(spec.dtypes[0]), "ssm_state_dtype": str(spec.dtypes[-1])}
        elif hasattr(spec, "dtype"):
            dtypes["kv_dtype"] = str(spec.dtype)
    return dtypes | {
        "model_class": f"{model.__module__}.{model.__qualname__}",
        "graph_mode": f"{compilation.mode.name}/{compilation.cudagraph_mode.name}",
        "compile_sizes": list(compilation.cudagraph_capture_sizes or ()),
        "max_num_seqs": config.scheduler_config.max_num_seqs,
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "async_scheduling": config.scheduler_config.async_scheduling,
        "prefix_caching": config.cache_config.enable_prefix_caching,
        "block_size": config.cache_config.block_size,
        "num_blocks": config.cache_config.num_gpu_blocks,
        "dtype": str(config.model_config.dtype),
        "quantization": config.model_config.quantization,
        "runner": f"{type(runner).__module__}.{type(runner).__qualname__}",
    }
