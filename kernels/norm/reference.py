"""RMS normalisation as a formula: differentiable torch, at least float32 inside (float64 stays float64)."""

import torch
from torch.nn import functional


def _normalise(x: torch.Tensor, eps: float) -> torch.Tensor:
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(dim=-1, keepdim=True) + eps)


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = x / RMS(x) * (1 + weight) over the last dimension; the mean is not subtracted.

    x [..., H], weight [H] zero-centred as the checkpoint holds it; the result has x's dtype.
    Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, section 4.
    """
    y = _normalise(x, eps)
    return (y * (1.0 + weight.to(y.dtype))).to(x.dtype)


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s), s) with s = x + residual rounded to x's dtype, as the next layer will read it."""
    total = x + residual
    return rms_norm(total, weight, eps), total


def rms_norm_gated(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """y = weight * x / RMS(x) * silu(z) over the last dimension, with a plain (not zero-centred) weight.

    x, z [..., V], weight [V]; the result has x's dtype. Yang et al., Gated Delta Networks, 2024, figure 1: the output
    of the delta rule is normalised per head and gated.
    """
    y = _normalise(x, eps)
    return (y * weight.to(y.dtype) * functional.silu(z.to(y.dtype))).to(x.dtype)
