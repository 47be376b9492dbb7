"""An MLP in FP8 blocks on ranks whose slice ends inside a block: the ranks' outputs add up to the whole layer's."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.nn import functional

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.kernels.gemm import dequantize_block, quantize_block
from qwen3next_plugin.layers_fp8 import Fp8Columns, Fp8Rows, fp8_layers, left_out_of_fp8
from qwen3next_plugin.layers_moe import GatedMLP
from tests.configs import new_form

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


def fp8_spec(ignored: list[str]) -> Any:
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ignored}
    return parse_config(new_form(quantization_config=quant))


LAYER = "model.layers.3"
OF_ONE_EXPERT = [f"{LAYER}.mlp.experts.1.{part}_proj" for part in ("gate", "up", "down")]
OF_ALL_EXPERTS = [f"{LAYER}.mlp.experts.{i}.{part}_proj" for i in range(8) for part in ("gate", "up", "down")]


@pytest.mark.parametrize(
    ("ignored", "module", "left_out"),
    [
        ([f"{LAYER}.self_attn.{part}_proj" for part in "qkv"], f"{LAYER}.self_attn.qkv_proj", True),
        ([f"{LAYER}.self_attn.{part}_proj" for part in "qkv"], "model.layers.7.self_attn.qkv_proj", False),
        ([f"{LAYER}.self_attn.qkv_proj"], f"{LAYER}.self_attn.qkv_proj", True),
        (["self_attn"], f"{LAYER}.self_attn.o_proj", True),
        ([LAYER], f"{LAYER}.mlp.shared_expert.gate_up_proj", True),
        ([LAYER], "model.layers.31.mlp.shared_expert.gate_up_proj", False),
        (["mlp.gate"], f"{LAYER}.mlp.shared_expert.gate_up_proj", False),
        (["linear_attn.in_proj_ba"], "model.layers.0.linear_attn.in_proj_ba", True),
        (["linear_attn.in_proj_ba"], "model.layers.0.linear_attn.in_proj_qkvz", False),
        ([f"{LAYER}.mlp.experts"], f"{LAYER}.mlp.experts", True),
        (OF_ALL_EXPERTS, f"{LAYER}.mlp.experts", True),
        (OF_ALL_EXPERTS, "mtp.layers.0.mlp.experts", False),
        (["mtp.fc"], "mtp.fc", True),
    ],
)
def test_what_a_list_leaves_out_is_built_unquantised(ignored: list[str], module: str, left_out: bool) -> None:
    """Module by module, whatever the engine makes of the list, and the same on any number of ranks."""
    spec = fp8_spec(ignored)
    assert left_out_of_fp8(module, spec) is left_out
    for size in (1, 2, 8):
        lent = fp8_layers(replace(layers(0, size), quant_config="engine's"), spec)
        assert lent.fp8_block(module) == (None if left_out else 128)
        assert lent.options(module)["quant_config"] == (None if left_out else "engine's")


@pytest.mark.parametrize(
    ("ignored", "module", "said"),
    [
        ([f"{LAYER}.self_attn.q_proj"], f"{LAYER}.self_attn.qkv_proj", "q_proj to v_proj"),
        ([f"{LAYER}.mlp.up_proj"], f"{LAYER}.mlp.gate_up_proj", "gate_proj to up_proj"),
        (OF_ONE_EXPERT, f"{LAYER}.mlp.experts", "experts.0.gate_proj to down_proj"),
    ],
)
def test_parts_of_a_fused_module_are_left_out_together(ignored: list[str], module: str, said: str) -> None:
    with pytest.raises(ConfigError, match=rf"parts of {module} unquantised and others not: .*{said}, or none"):
        left_out_of_fp8(module, fp8_spec(ignored))


def test_nothing_changes_without_a_list() -> None:
    lent = layers(0, 2)
    assert fp8_layers(lent, parse_config(new_form())) is lent and fp8_layers(lent, fp8_spec([])) is lent
