"""Engines' linear layers whose few rows go through our product: forced on the CPU, in Triton's interpreter."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gemm import MAX_ROWS
from qwen3next_plugin.layers import GatedAttentionParts, GdnParts
from qwen3next_plugin.layers_base import ZeroCentredRMSNorm
from qwen3next_plugin.layers_few import FewRows, take_few_rows
from qwen3next_plugin.layers_moe import SparseMoE
from tests.helpers import relative_error

from .few_layers import HIDDEN, Linear, Method, lent, small_spec


@pytest.fixture
def forced(device: str) -> Iterator[str]:
    """Triton wherever the tensors are, as on a GPU."""
    dispatch.prefer("triton")
    yield device
    dispatch.prefer(None)


def norm(device: str) -> ZeroCentredRMSNorm:
    made = ZeroCentredRMSNorm(HIDDEN, 1e-6)
    made.weight.data.normal_()
    return made.to(device)


def gdn(device: str, name: str = "model.layers.0.linear_attn") -> Any:
    return GdnParts(small_spec(), lent(), name).to(device)


@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
def test_two_projections_at_once(rows: int, forced: str) -> None:
    parts, before = gdn(forced), norm(forced)
    x, residual = torch.randn(2, rows, HIDDEN, device=forced)
    for added in (residual, None):
        *products, total = parts.project(x, added, before)
        y, expected = before.add(x, added)
        assert torch.equal(total, expected)
        for actual, layer in zip(products, (parts.in_proj_qkvz, parts.in_proj_ba), strict=True):
            assert relative_error(actual, layer.exact(y)) < 1e-6
            assert layer.quant_method.rows == []
    core = torch.randn(rows, 4, 8, device=forced)
    assert relative_error(parts.finish(core), parts.out_proj.exact(core.flatten(1))) < 1e-6
    assert parts.out_proj.quant_method.rows == []


def test_more_rows_are_the_engines(forced: str) -> None:
    parts, before = gdn(forced), norm(forced)
    x, residual = torch.randn(2, MAX_ROWS + 1, HIDDEN, device=forced)
    for times, added in enumerate((residual, None), start=1):
        *products, total = parts.project(x, added, before)
        y, expected = before.add(x, added)
        assert torch.equal(total, expected)
        for actual, layer in zip(products, (parts.in_proj_qkvz, parts.in_proj_ba), strict=True):
            assert torch.equal(actual, Method().apply(layer, y))
            assert layer.quant_method.rows == [MAX_ROWS + 1] * times
    core = torch.randn(MAX_ROWS + 1, 4, 8, device=forced)
    assert torch.equal(parts.finish(core), Method().apply(parts.out_proj, core.flatten(1)))


def test_on_a_cpu_all_are_the_engines() -> None:
    parts, x = gdn("cpu"), torch.randn(2, HIDDEN)
    parts.project(x, x, norm("cpu"))
    parts.finish(torch.randn(2, 4, 8))
    for layer in (parts.in_proj_qkvz, parts.in_proj_ba, parts.out_proj):
        assert layer.quant_method.rows == [2]


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("rows", [2, 6, MAX_ROWS + 1])
def test_attention_behind_its_gate(rows: int, size: int, forced: str) -> None:
    """On several ranks the engine's layer sums over them, whoever computed the product."""
    parts: Any = GatedAttentionParts(small_spec(), lent(size), torch.zeros(8, 4), "model.layers.3.self_attn").to(forced)
    attended, gate = (torch.randn(rows, 2 * 16 // size, device=forced) for _ in range(2))
    expected = parts.o_proj.exact(attended.double() * torch.sigmoid(gate.double())) + (1000 if size > 1 else 0)
    assert relative_error(parts.finish(attended, gate), expected) < 1e-6
    x, before = torch.randn(rows, HIDDEN, device=forced), norm(forced)
    qkv, total = parts.project(x, x, before)
    assert relative_error(qkv, parts.qkv_proj.exact(before(x + x))) < 1e-6 and torch.equal(total, x + x)
    for layer in (parts.o_proj, parts.qkv_proj):
        assert layer.quant_method.rows == ([rows] if rows > MAX_ROWS else [])


def test_the_routers_logits(forced: str) -> None:
    moe: Any = SparseMoE(small_spec(), lent(), "model.layers.0.mlp").to(forced)
    before = norm(forced)
    for rows in (1, 3, 20):
        x = torch.randn(rows, HIDDEN, device=forced)
        (logits, y), total = moe.router.of_norm(x, x, before, moe.gate)
        assert relative_error(logits, moe.gate.exact(y)) < 1e-6
        assert relative_error(y, before(x + x).double()) < 1e-6 and torch.equal(total, x + x)
    assert moe.gate.quant_method.rows == [20]


def test_a_layer_in_anothers_place_is_called(forced: str) -> None:
    """As LoRA does it, around the engine's layer."""

    class Around(nn.Module):
        def __init__(self, base: Linear) -> None:
            super().__init__()
            self.base, self.weight = base, base.weight

        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
            return self.base(x)[0] + 1, None

    parts, x = gdn(forced), torch.randn(2, HIDDEN, device=forced)
    plain = parts.in_proj_ba
    parts.in_proj_ba = Around(plain)
    before = norm(forced)
    assert relative_error(parts.project(x, None, before)[1], plain.exact(before(x)) + 1) < 1e-6


def test_weights_that_the_engine_re_laid_are_its_own(forced: str) -> None:
    layer, x = Linear(32, 48, prefix="q_proj").to(forced), torch.randn(2, 32, device=forced)
    take_few_rows("re-laid", layer)
    layer(x)
    assert layer.quant_method.rows == []
    layer.weight_scale_inv.data = layer.weight_scale_inv.data.half()
    layer(x)
    assert layer.quant_method.rows == [2]


def test_a_bias_is_the_engines(forced: str) -> None:
    layer, x = Linear(32, 48).to(forced), torch.randn(2, 32, device=forced)
    take_few_rows("biased", layer)
    bias = torch.randn(48, device=forced)
    assert torch.equal(layer.quant_method.apply(layer, x, bias), functional.linear(x, layer.weight, bias))
    assert layer.quant_method.rows == [2]


def compiled(parts: Any) -> tuple[Any, list[str]]:
    """Its projection as one graph for any number of rows, and the graphs' code."""
    torch._dynamo.reset()
    graphs: list[str] = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph.print_readable(print_output=False))
        return graph

    return torch.compile(parts.project, fullgraph=True, dynamic=True, backend=backend), graphs


def test_one_graph_serves_all_numbers_of_rows_and_all_layers(forced: str) -> None:
    """Names are inputs of graphs, for an engine compiles equal graphs once."""
    codes = []
    for name in ("model.layers.0.linear_attn", "model.layers.1.linear_attn"):
        parts = gdn(forced, name)
        project, graphs = compiled(parts)
        before = norm(forced)
        for rows in (3, MAX_ROWS, 40):
            x = torch.randn(rows, HIDDEN, device=forced)
            *products, total = project(x, x, before)
            assert torch.equal(total, x + x)
            for actual, layer in zip(products, (parts.in_proj_qkvz, parts.in_proj_ba), strict=True):
                assert relative_error(actual, layer.exact(before(total))) < 1e-6
        assert parts.in_proj_ba.quant_method.rows == [40] and len(graphs) == 1
        codes += graphs
    assert codes[0] == codes[1] and "linear_attn" not in codes[0].replace("L_self", "")


def test_two_models_layers_of_one_name_are_not_mixed_up(forced: str) -> None:
    parts, x = gdn(forced), torch.randn(3, HIDDEN, device=forced)
    project, _ = compiled(parts)
    before = norm(forced)
    project(x, x, before)
    other = FewRows("model.layers.0.linear_attn.in_proj", Linear(HIDDEN, 8).to(forced), Linear(HIDDEN, 8).to(forced))
    with pytest.raises(RuntimeError, match=r"'model.layers.0.linear_attn.in_proj' is no longer the last"):
        project(x, x, before)
    assert other.name == parts.in_proj.name
