"""An MLP in FP8 blocks on ranks whose slice ends inside a block: the ranks' outputs add up to the whole layer's."""

from typing import Any

import pytest
import torch
from torch.nn import functional

from qwen3next_plugin.kernels.gemm import dequantize_block, quantize_block
from qwen3next_plugin.layers_fp8 import Fp8Columns, Fp8Rows
from qwen3next_plugin.layers_moe import GatedMLP

from .parallel import layers

HIDDEN = 136


@pytest.mark.parametrize(("width", "size"), [(512, 8), (384, 2), (128, 4)])
def test_ranks_add_up(width: int, size: int) -> None:
    parts = {name: quantize_block(torch.randn(width, HIDDEN)) for name in ("gate", "up")}
    down = quantize_block(torch.randn(HIDDEN, width))
    x = torch.randn(5, HIDDEN, dtype=torch.float64)
    gate, up, back = (dequantize_block(*pair, torch.float64) for pair in (parts["gate"], parts["up"], down))
    expected = (functional.silu(x @ gate.T) * (x @ up.T)) @ back.T
    total = torch.zeros_like(expected)
    for rank in range(size):
        mlp = GatedMLP(HIDDEN, width, layers(rank, size), "model.layers.0.mlp.shared_expert", reduce_results=False)
        for parameter in mlp.parameters():
            parameter.data.view(torch.uint8).fill_(0x7F)
        found: dict[str, Any] = dict(mlp.named_parameters())
        for i, (codes, factors) in enumerate(parts.values()):
            for name, tensor in (("weight", codes), ("weight_scale_inv", factors)):
                parameter = found[f"gate_up_proj.{name}"]
                parameter.weight_loader(parameter, tensor, i)
        for name, tensor in (("weight", down[0]), ("weight_scale_inv", down[1])):
            parameter = found[f"down_proj.{name}"]
            parameter.weight_loader(parameter, tensor)
        total += mlp(x)
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-9)


def test_the_ranks_are_summed_only_where_asked() -> None:
    x = torch.zeros(2, 64)
    for reduce, offset in ((True, 1000), (False, 0)):
        mlp = GatedMLP(HIDDEN, 128, layers(1, 2), "model.layers.0.mlp", reduce_results=reduce)
        for parameter in mlp.parameters():
            parameter.data.zero_()
        assert mlp.down_proj(x)[0].unique().tolist() == [offset]


@pytest.mark.parametrize(
    ("width", "size", "block"), [(512, 4, 128), (512, 8, None), (192, 1, 128)], ids=["whole", "bf16", "one rank"]
)
def test_engines_keep_the_layers_they_can_cut(width: int, size: int, block: int | None) -> None:
    mlp = GatedMLP(HIDDEN, width, layers(0, size, block), "model.layers.0.mlp.shared_expert")
    assert not isinstance(mlp.gate_up_proj, Fp8Columns) and not isinstance(mlp.down_proj, Fp8Rows)
