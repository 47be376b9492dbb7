"""vLLM's worker compiles before it measures memory and before it captures, without touching a state."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from qwen3next_plugin import warmup_gdn as core
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.kernels import compilations, dispatch
from qwen3next_plugin.layers import GdnParts
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm
from qwen3next_plugin.vllm_integration import warmup
from qwen3next_plugin.vllm_integration.gdn_layer import Qwen3NextGdnLayer
from tests.configs import new_form
from tests.cpu.core.parallel import layers

DRAFTS = 2


@pytest.fixture(autouse=True)
def _kernels_run() -> Iterator[None]:
    dispatch.prefer(dispatch.TRITON)
    yield
    dispatch.prefer(None)
    compilations.serve(None)


class Model(nn.Module):
    """One Gated DeltaNet layer and a norm."""

    layer: Any

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.spec = parse_config(new_form())
        layer = Qwen3NextGdnLayer.__new__(Qwen3NextGdnLayer)
        GdnParts.__init__(layer, self.spec, layers(0, 1), "model.layers.0.linear_attn")
        layer.spec, layer.vllm_config = self.spec, config
        self.layer, self.norm = layer, ZeroCentredRMSNorm(64, 1e-6)
        for parameter in self.parameters():
            parameter.data.fill_(float("nan"))


class Worker:
    """As far as vLLM's goes here; notes what happens in `events`."""

    def __init__(self, drafts: int) -> None:
        self.events: list[str] = []
        self.device = torch.device("cpu")
        self.vllm_config = SimpleNamespace(
            model_config=SimpleNamespace(dtype=torch.float32),
            parallel_config=SimpleNamespace(tensor_parallel_size=1),
            cache_config=SimpleNamespace(mamba_cache_dtype="auto", mamba_ssm_cache_dtype="float32"),
            scheduler_config=SimpleNamespace(max_num_batched_tokens=64),
            compilation_config=SimpleNamespace(max_cudagraph_capture_size=None),
            speculative_config=SimpleNamespace(num_speculative_tokens=drafts) if drafts else None,
        )
        self.model = Model(self.vllm_config)
        drafter = SimpleNamespace(model=nn.ModuleList([ZeroCentredRMSNorm(32, 1e-6)]))
        self.model_runner = SimpleNamespace(get_model=lambda: self.model, **({"drafter": drafter} if drafts else {}))

    def determine_available_memory(self) -> int:
        self.events.append("measured")
        layer = self.model.layer
        shapes, dtypes = layer.get_state_shape(), layer.get_state_dtype()
        layer.kv_cache = tuple(
            torch.full((3, *shape), float("nan"), dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        return 7

    def compile_or_warm_up_model(self) -> str:
        self.events.append("captured")
        assert compilations._warn is None
        return "times"


@pytest.mark.parametrize("drafts", [0, DRAFTS])
def test_warm_before_memory_is_measured_and_before_capture(drafts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    worker = Worker(drafts)
    measure = warmup._with_weights(Worker.determine_available_memory)
    start = warmup._with_states(Worker.compile_or_warm_up_model)
    steps: list[tuple[str, ...]] = []
    gdn_step, norm_sizes = core.gdn_step, []

    def noted(qkvz: torch.Tensor, *args: Any, **rows: Any) -> None:
        verifies = "recurrent" in rows and rows["recurrent"].num_accepted_tokens is not None
        kind = (*rows, *(["verifies"] if verifies else []))
        if steps[-1:] != [kind]:  # each comes with several numbers of tokens and tiles
            worker.events.append("warm")
            steps.append(kind)
        gdn_step(qkvz, *args, **rows)

    def normed(self: ZeroCentredRMSNorm, x: torch.Tensor) -> torch.Tensor:
        norm_sizes.append(x.shape[1])
        return x

    monkeypatch.setattr(core, "gdn_step", noted)
    monkeypatch.setattr(ZeroCentredRMSNorm, "forward", normed)
    assert measure(worker) == 7
    assert start(worker) == "times"
    expected = [("prefill",), ("recurrent",), ("prefill", "recurrent")]
    if drafts:
        expected += [("recurrent", "verifies"), ("prefill", "recurrent", "verifies")]
    assert steps == 2 * expected
    assert set(norm_sizes) == ({64, 32} if drafts else {64})
    warm = ["warm"] * len(expected)
    assert worker.events == [*warm, "measured", *warm, "captured"]
    assert compilations._warn is not None

    assert all(bool(state.isnan().all()) for state in worker.model.layer.kv_cache)
    assert all(bool(parameter.isnan().all()) for parameter in worker.model.parameters())


def test_plain_torch_needs_no_warm_up() -> None:
    dispatch.prefer(dispatch.REFERENCE)
    worker = Worker(0)
    assert warmup._warm(worker, warmup._scratch_states).layers == 0


def test_workers_of_this_platform_and_switch_only(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.platforms import current_platform
    from vllm.v1.worker import gpu_worker

    class Fresh(Worker):
        pass

    original: Any = Fresh.compile_or_warm_up_model
    monkeypatch.setattr(gpu_worker, "Worker", Fresh)
    warmup.warm_up_before_serving()  # a CPU
    assert Fresh.compile_or_warm_up_model is original
    monkeypatch.setattr(type(current_platform), "is_cuda_alike", lambda self: True)
    monkeypatch.setenv("QWEN3NEXT_WARMUP", "0")
    warmup.warm_up_before_serving()
    assert Fresh.compile_or_warm_up_model is original
    monkeypatch.delenv("QWEN3NEXT_WARMUP")
    warmup.warm_up_before_serving()
    once: Any = Fresh.compile_or_warm_up_model
    warmup.warm_up_before_serving()
    assert once.__wrapped__ is original and vars(Fresh)["compile_or_warm_up_model"] is once
    measures: Any = vars(Fresh)["determine_available_memory"]
    assert measures.__wrapped__ is Worker.determine_available_memory
