"""Layers as engines lend them, with methods that multiply, and a small model's sizes for them."""

import dataclasses
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.kernels.gemm import dequantize_block, quantize_block
from qwen3next_plugin.layers_base import ParallelLayers
from tests.configs import new_form

from .parallel import layers

HIDDEN = 64


class Method:
    """As engines' quantisation methods; remembers the rows of each product."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        self.rows.append(x.shape[0])
        scale = getattr(layer, "weight_scale_inv", None)
        weight = layer.weight if scale is None else dequantize_block(layer.weight, scale)
        return functional.linear(x, weight.to(x.dtype), bias)


class Linear(nn.Module):
    """As engines' layers: a product by the method, then, of a row-parallel one, the sum over ranks."""

    def __init__(self, inputs: int, outputs: Any, *, prefix: str = "", reduces: bool = False, **options: Any) -> None:
        super().__init__()
        outputs = sum(outputs) if isinstance(outputs, list) else outputs
        self.quant_method, self.reduces = Method(), reduces
        weight = torch.randn(outputs, inputs)
        if prefix.endswith(("in_proj_qkvz", "_proj")):
            codes, scale = quantize_block(weight)
            self.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
            weight = codes
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        output = self.quant_method.apply(self, x, None)
        return output + 1000 if self.reduces else output, None

    def exact(self, x: torch.Tensor) -> torch.Tensor:
        scale = getattr(self, "weight_scale_inv", None)
        weight = self.weight if scale is None else dequantize_block(self.weight, scale, torch.float64)
        return functional.linear(x.double(), weight.double())


def lent(size: int = 1) -> ParallelLayers:
    def qkv(hidden: int, head_dim: int, heads: int, kv_heads: int, **options: Any) -> Linear:
        return Linear(hidden, head_dim * (heads + 2 * kv_heads) // size, **options)

    def row(inputs: int, outputs: int, **options: Any) -> Linear:
        return Linear(inputs // size, outputs, reduces=size > 1, **options)

    def column(inputs: int, outputs: list[int], **options: Any) -> Linear:
        return Linear(inputs, [each // size for each in outputs], **options)

    return dataclasses.replace(layers(0, size, None), merged_column=column, qkv=qkv, row=row, replicated=Linear)


def small_spec() -> Qwen3NextSpec:
    spec = parse_config(new_form())
    gdn = dataclasses.replace(spec.gdn, num_k_heads=2, num_v_heads=4, head_k_dim=8, head_v_dim=8)
    attention = dataclasses.replace(spec.attention, num_heads=2, num_kv_heads=2, head_dim=16)
    moe = dataclasses.replace(
        spec.moe, num_experts=4, top_k=2, intermediate_size=16, shared_intermediate_size=16, norm_topk_prob=True
    )
    return dataclasses.replace(spec, hidden_size=HIDDEN, gdn=gdn, attention=attention, moe=moe)
