"""What the layers are built from: parallel layers an engine lends, parameters with the checkpoint's names, norms."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from .config import IntegerFormat
from .kernels.norm import norm_of_sum, rms_norm


@dataclass(frozen=True)
class ParallelLayers:
    """An engine's linear layers, which load their own slices, and this process's place among the tensor-parallel ranks.

    The layers' forward returns a tuple with the output first. ``fp8_block`` says of a module, by its prefix, whether
    its weights are FP8 in blocks (128) or not quantised (None); ``all_reduce`` sums over the ranks. Where modules are
    stored in packed integers, ``integer_format`` says how, by the fused module's name (see `layers_integer`);
    ``left_out`` says which modules of a quantised checkpoint are not (see `layers_fp8`).
    """

    rank: int
    size: int
    expert_parallel: bool
    quant_config: Any
    fp8_block: Callable[[str], int | None]
    merged_column: Callable[..., nn.Module]
    qkv: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    replicated: Callable[..., nn.Module]
    silu_and_mul: Callable[[], nn.Module]
    all_reduce: Callable[[torch.Tensor], torch.Tensor]
    integer_format: Callable[[str], IntegerFormat | None] = lambda prefix: None
    left_out: Callable[[str], bool] = lambda prefix: False

    def options(self, prefix: str) -> dict[str, Any]:
        """What every quantisable layer is built with; ``prefix`` is its name in the checkpoint."""
        quant_config = None if self.left_out(prefix) else self.quant_config
        return {"bias": False, "quant_config": quant_config, "prefix": prefix}


def frozen_parameter(
    *shape: int, dtype: torch.dtype | None = None, loader: Callable[..., None] | None = None
) -> nn.Parameter:
    """An uninitialised parameter that is not trained, with the `weight_loader` attribute that engines look for."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    if loader is not None:
        vars(parameter)["weight_loader"] = loader
    return parameter


class WeightHolder(nn.Module):
    """A module that is only a place for `weight`, so that the parameter has the checkpoint's name."""

    def __init__(self, *shape: int, loader: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.weight = frozen_parameter(*shape, loader=loader)


class ZeroCentredRMSNorm(WeightHolder):
    """x / RMS(x) * (1 + weight), with the residual added first when there is one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); without a residual x starts it."""
        return norm_of_sum(x, residual, self.weight, self.eps)
