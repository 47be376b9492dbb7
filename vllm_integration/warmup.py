"""Kernels are compiled before vLLM is ready, and what is compiled later is told of.

In two parts. Before vLLM measures memory, for the loaded weights: it captures graphs while it measures, and what a
compiled kernel takes of the GPU is to be counted. And once the states are there, before its own warm-up and capture:
as a rule nothing is left to compile then.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first

from qwen3next_plugin.compat import Reliance, check_reliances
from qwen3next_plugin.settings import read_settings
from qwen3next_plugin.warmup import Serving, WarmUp, serve, warm_up
from qwen3next_plugin.warmup_rows import SkippedRows, StepRows

from .gdn_layer import Qwen3NextGdnLayer

logger = init_logger("vllm.qwen3next_plugin")

_WORKER = "vllm.v1.worker.gpu_worker.Worker"
_WHY = "to compile kernels before the server is ready"
_RELIANCES = [
    Reliance(_WORKER, _WHY, attributes=("determine_available_memory", "compile_or_warm_up_model")),
    Reliance("vllm.v1.worker.gpu_model_runner.GPUModelRunner", _WHY, attributes=("get_model",)),
]
_MARK = "_qwen3next_warms_up"
_DRAFTERS = ("drafter", "speculator")  # as the two model runners call what drafts

States = Callable[[nn.Module], tuple[torch.Tensor, torch.Tensor] | None]


def warm_up_before_serving() -> None:
    """Makes GPU workers of this process warm up; from the model, so other models' workers stay as they are.

    Safe to repeat. Raises DriftError where vLLM's worker has no such methods any more.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cuda_alike() or not read_settings().warm_up:
        return
    check_reliances(_RELIANCES)
    from vllm.v1.worker.gpu_worker import Worker

    if not hasattr(Worker.compile_or_warm_up_model, _MARK):
        Worker.determine_available_memory = _with_weights(Worker.determine_available_memory)
        Worker.compile_or_warm_up_model = _with_states(Worker.compile_or_warm_up_model)


def _with_weights(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def determine_available_memory(self: Any) -> Any:
        _warm(self, _scratch_states)
        return original(self)

    return determine_available_memory


def _with_states(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def compile_or_warm_up_model(self: Any) -> Any:
        warmed = _warm(self, _states)
        result = original(self)
        serve(logger, warmed)
        return result

    vars(compile_or_warm_up_model)[_MARK] = True
    return compile_or_warm_up_model


def _warm(worker: Any, states: States) -> WarmUp:
    config = worker.vllm_config
    speculative = config.speculative_config
    drafts = (speculative.num_speculative_tokens or 0) if speculative else 0
    steps = list(_steps(worker.device, drafts))
    models = list(_models(worker.model_runner))
    serving = Serving(
        dtype=config.model_config.dtype,
        device=worker.device,
        # Graphs pad a step to a captured size.
        max_tokens=max(
            config.scheduler_config.max_num_batched_tokens, config.compilation_config.max_cudagraph_capture_size or 0
        ),
        top_k=cast(Any, models[0]).spec.moe.top_k,
        states=states,
        steps=lambda layer: steps,
    )
    warmed = warm_up(models, serving)
    if warmed.layers:
        logger.info("%s", warmed)
    return warmed


def _models(runner: Any) -> Iterator[nn.Module]:
    yield runner.get_model()
    for name in _DRAFTERS:
        model = getattr(getattr(runner, name, None), "model", None)
        if isinstance(model, nn.Module):
            yield model


def _steps(device: torch.device, drafts: int) -> Iterator[StepRows]:
    """Every combination of rows that `gdn_metadata` makes."""
    rows = SkippedRows(device)
    prefill = {"prefill": rows.prefill()}
    recurrent = [rows.decode(), *([rows.verify(1 + drafts)] if drafts else [])]
    yield prefill
    for alone in recurrent:
        yield {"recurrent": alone}
        yield prefill | {"recurrent": alone}


def _states(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    if not isinstance(layer, Qwen3NextGdnLayer):
        return None
    return layer.states()


def _scratch_states(layer: nn.Module) -> tuple[torch.Tensor, torch.Tensor] | None:
    """One block, as vLLM lays blocks out: what Triton specialises on is the same."""
    if not isinstance(layer, Qwen3NextGdnLayer):
        return None
    device = layer.A_log.device
    conv, ssm = (
        torch.zeros(1, *shape, dtype=dtype, device=device)
        for shape, dtype in zip(layer.get_state_shape(), layer.get_state_dtype(), strict=True)
    )
    return conv if is_conv_state_dim_first() else conv.transpose(1, 2), ssm
