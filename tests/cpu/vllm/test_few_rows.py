"""vLLM's own linear layers whose few rows go through our product: what this package relies on in them."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization import fp8
from vllm.model_executor.layers.quantization.fp8 import Fp8Config

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gemm import MAX_ROWS, dequantize_block, quantize_block
from qwen3next_plugin.layers_few import take_few_rows
from tests.helpers import relative_error


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One rank, and Triton on the CPU, as on a GPU. vLLM chooses no FP8 product of its own: few CPUs have one."""
    monkeypatch.setattr(parallel_state, "_TP", SimpleNamespace(rank_in_group=0, world_size=1))
    monkeypatch.setattr(fp8, "init_fp8_linear_kernel", lambda **_: SimpleNamespace())
    dispatch.prefer("triton")
    yield
    dispatch.prefer(None)


def layer_of(quantised: bool) -> tuple[Any, list[int], torch.Tensor]:
    """A layer as it is loaded, the rows of products that vLLM's own method computed, and the weight in float64."""
    config: Any = VllmConfig()
    config.model_config = SimpleNamespace(dtype=torch.float32, hf_text_config=None)
    quant = Fp8Config(True, "dynamic", [], [128, 128]) if quantised else None
    with set_current_vllm_config(config):
        layer = ReplicatedLinear(256, 128, bias=False, quant_config=quant, params_dtype=torch.float32)
    weight, rows, method = torch.randn(128, 256), [], layer.quant_method
    if quantised:
        codes, scale = quantize_block(weight)
        layer.weight.data.copy_(codes)
        layer.weight_scale_inv.data.copy_(scale)
        weight = dequantize_block(codes, scale, torch.float64)
    else:
        layer.weight.data.copy_(weight)

    def own(asked: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        rows.append(x.shape[0])
        return torch.nn.functional.linear(x, weight.to(x.dtype))

    method.apply = own
    take_few_rows(f"some.{quantised}", layer)
    return layer, rows, weight.double()


@pytest.mark.parametrize("quantised", [True, False])
@pytest.mark.parametrize("compiled", [True, False])
def test_a_layer_of_vllm(quantised: bool, compiled: bool, forced: None) -> None:
    """Its weights, under vLLM's names and of vLLM's parameter classes, as they are loaded."""
    layer, rows, weight = layer_of(quantised)
    call: Any = layer
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for count in (2, MAX_ROWS, MAX_ROWS + 1):
        x = torch.randn(count, 256)
        assert relative_error(call(x)[0], x.double() @ weight.T) < 1e-6
    assert rows == [MAX_ROWS + 1]


def test_weights_packed_for_a_cpu_stay_vllms(forced: None) -> None:
    layer, rows, weight = layer_of(quantised=False)
    with set_current_vllm_config(VllmConfig()):
        layer.quant_method.process_weights_after_loading(layer)
    x = torch.randn(2, 256)
    assert relative_error(layer(x)[0], x.double() @ weight.T) < 1e-6
    assert rows == [2]
