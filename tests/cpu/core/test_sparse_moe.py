"""A layer's experts as both engines run them, on one rank and on several, against the oracle's formula."""

import dataclasses

import pytest
import torch

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.kernels.gemm import dequantize_block, quantize_block
from qwen3next_plugin.layers_moe import GatedMLP, SharedBehindExperts, SparseMoE
from qwen3next_plugin.reference.layers import sparse_moe
from qwen3next_plugin.weights import Placement
from tests.configs import new_form

from .parallel import layers

HIDDEN, EXPERTS = 136, 4
EXPERT_NAMES = ("mlp.experts.w13", "mlp.experts.w2")
SHARED_NAMES = ("mlp.shared_expert.gate_up_proj.weight", "mlp.shared_expert.down_proj.weight")


def spec_with(width: int, shared: int) -> Qwen3NextSpec:
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    spec = parse_config(new_form(quantization_config=quant))
    moe = dataclasses.replace(
        spec.moe, num_experts=EXPERTS, top_k=2, intermediate_size=width, shared_intermediate_size=shared
    )
    return dataclasses.replace(spec, hidden_size=HIDDEN, moe=moe)


def whole_weights(width: int) -> dict[str, torch.Tensor]:
    shapes = [(EXPERTS, 2 * width, HIDDEN), (EXPERTS, HIDDEN, width), (2 * width, HIDDEN), (HIDDEN, width)]
    return {name: torch.randn(shape) / 8 for name, shape in zip(EXPERT_NAMES + SHARED_NAMES, shapes, strict=True)}


def load(layer: SparseMoE, name: str, whole: torch.Tensor) -> None:
    """As `weights_loading` does, a tensor of the checkpoint after the other."""
    parameter = layer.get_parameter(name.removeprefix("mlp."))
    loader = vars(parameter)["weight_loader"]
    if name.startswith("mlp.experts."):
        loader(parameter, whole, Placement(f"model.layers.0.{name}"))
    elif "gate_up" in name:
        for place, part in enumerate(whole.chunk(2)):
            loader(parameter, part, place)
    else:
        loader(parameter, whole)


@pytest.mark.parametrize("fp8", [True, False])
@pytest.mark.parametrize(("width", "size"), [(128, 1), (512, 8), (384, 2)])
def test_the_shared_expert_runs_as_one_more(width: int, size: int, fp8: bool) -> None:
    """On every rank; their sum is what the oracle computes with the shared expert apart."""
    spec, weights = spec_with(width, width), whole_weights(width)
    gates = {"mlp.gate.weight": torch.randn(EXPERTS, HIDDEN), "mlp.shared_expert_gate.weight": torch.randn(1, HIDDEN)}
    stored = {name: quantize_block(tensor) for name, tensor in weights.items()} if fp8 else {}
    true = {name: dequantize_block(*stored[name], torch.float64) if fp8 else weights[name].double() for name in weights}
    x = torch.randn(3, HIDDEN)
    expected = sparse_moe(x.double(), true | {name: gate.double() for name, gate in gates.items()}, spec.moe)
    total = torch.zeros_like(expected)
    for rank in range(size):
        layer = SparseMoE(spec, layers(rank, size, 128 if fp8 else None), "model.layers.0.mlp")
        assert isinstance(layer.shared_expert, SharedBehindExperts)
        for parameter in layer.parameters():
            parameter.data.view(torch.uint8).fill_(0x7F)  # NaN, or as factors huge
        for name, gate in gates.items():
            layer.get_parameter(name.removeprefix("mlp.")).data.copy_(gate)
        for name, tensor in weights.items():
            if not fp8:
                load(layer, name, tensor)
                continue
            for whole, suffix in zip(stored[name], ("", "_scale_inv"), strict=True):
                load(layer, name + suffix, whole)
        total += layer.mixture(x, layer.gate(x)[0]).double() - 1000 * (size > 1)
    torch.testing.assert_close(total, expected, rtol=1e-3, atol=1e-3 if size > 1 else 1e-5)


def unquantised_shared(prefix: str) -> int | None:
    return None if "shared" in prefix else 128


@pytest.mark.parametrize("why", ["wider", "whole experts on a rank", "another format"])
def test_a_shared_expert_unlike_the_others_stays_apart(why: str) -> None:
    spec = spec_with(128, 256 if why == "wider" else 128)
    lent = layers(
        0,
        1 if why != "whole experts on a rank" else 2,
        fp8_block=unquantised_shared if why == "another format" else None,
        expert_parallel=why == "whole experts on a rank",
    )
    layer = SparseMoE(spec, lent, "model.layers.0.mlp")
    assert isinstance(layer.shared_expert, GatedMLP)
    assert layer.get_parameter("experts.w13").shape[0] == EXPERTS // lent.size
