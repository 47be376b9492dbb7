"""Modules that hold norm weights under the checkpoint's names and call our kernels."""

from __future__ import annotations

import torch
from torch import nn

from qwen3next_plugin.kernels.norm import add_rms_norm, rms_norm


class WeightHolder(nn.Module):
    """A module that is only a place for `weight`, so that the parameter has the checkpoint's name."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(*shape), requires_grad=False)


class ZeroCentredRMSNorm(WeightHolder):
    """x / RMS(x) * (1 + weight), with the residual added first when there is one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); without a residual x starts it."""
        if residual is None:
            return self(x), x
        return add_rms_norm(x, residual, self.weight, self.eps)
