"""Layers that stand for an engine's, so that parts of the model can be built without one."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from qwen3next_plugin.layers_base import ParallelLayers


class SiluAndMul(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class Linear(nn.Module):
    """As engines answer: a tuple. On every rank whole."""

    def __init__(self, inputs: int, outputs: int, **options: Any) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs), requires_grad=False)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        return functional.linear(x, self.weight), None


def engine(*args: Any, **options: Any) -> nn.Module:
    """Stands for an engine's own layer where nothing is computed."""
    return nn.Identity()


def layers(
    rank: int,
    size: int,
    block: int | None = 128,
    *,
    fp8_block: Callable[[str], int | None] | None = None,
    expert_parallel: bool = False,
) -> ParallelLayers:
    """Rank `rank` of `size`; `block` is that of every module's FP8 weights, or `fp8_block` says it of each."""
    return ParallelLayers(
        rank=rank,
        size=size,
        expert_parallel=expert_parallel,
        quant_config=None,
        fp8_block=fp8_block or (lambda prefix: block),
        merged_column=engine,
        qkv=engine,
        row=engine,
        replicated=Linear,
        silu_and_mul=SiluAndMul,
        all_reduce=lambda x: x + 1000,
    )
