"""FP8 block-scaled quantisation and matrix products."""

import torch

from .. import dispatch
from . import reference
from .policy import activation_text, quantizes_activations
from .reference import FP8, block_size, dequantize_block, quantize_block

__all__ = ["FP8", "block_fp8_matmul", "block_size", "dequantize_block", "quantize_block", "quantize_tokens"]

dispatch.declare("quantize_tokens")
dispatch.declare("block_fp8_matmul", cuda=lambda: f"triton ({activation_text()})")


def _quantize_tokens_fake(x: torch.Tensor, *, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    groups = (x.shape[1] + reference.GROUP - 1) // reference.GROUP
    return x.new_empty(x.shape, dtype=FP8), x.new_empty((x.shape[0], groups), dtype=torch.float32)


@dispatch.custom_op(fake=_quantize_tokens_fake)
def quantize_tokens(x: torch.Tensor, *, backend: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Round activations to FP8 with one scale a token and group of 128 columns.

    x [M, K] bf16/fp16/fp32, rows may be strided -> (codes [M, K] float8_e4m3fn, scale [M, ceil(K/128)] float32), with
    value = code * scale and each group's largest magnitude at 448. Raises ValueError unless x is a matrix.
    DeepSeek-V3 report, 2024, section 3.3.2.
    """
    if x.dim() != 2:
        raise ValueError(f"quantize_tokens: x is {list(x.shape)}; it must be [M, K]")
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        codes, scale = reference.quantize_tokens(x)
        return codes.contiguous(), scale.contiguous()
    from . import triton

    return triton.quantize_tokens(x)


def _check_matmul(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"block_fp8_matmul: x is {list(x.shape)} and weight is {list(weight.shape)}; they must be [M, K] and [N, K]"
        )
    if weight.dtype != FP8 or scale_inv.dim() != 2:
        raise ValueError(
            f"block_fp8_matmul: weight is {weight.dtype} with scale_inv {list(scale_inv.shape)}; it must be {FP8} with "
            "a matrix of block factors"
        )
    block_size(weight, scale_inv)


def _block_fp8_matmul_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    *,
    quantize_activations: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@dispatch.custom_op(fake=_block_fp8_matmul_fake)
def block_fp8_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    *,
    quantize_activations: bool | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """x @ (weight * scale_inv expanded over its blocks).T, accumulated in float32.

    x [M, K] bf16/fp16/fp32, weight [N, K] float8_e4m3fn, scale_inv [ceil(N/128), ceil(K/128)] float32 (smaller blocks:
    see `block_size`) -> [M, N] in x's dtype. quantize_activations rounds x to FP8 by 1x128 groups first; None decides
    by M and the GPU (`policy.quantizes_activations`), and never rounds on a CPU. Raises ValueError for shapes that do
    not fit.
    """
    _check_matmul(x, weight, scale_inv)
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return reference.block_fp8_matmul(x, weight, scale_inv, bool(quantize_activations))
    from . import triton

    if quantize_activations is None:
        quantize_activations = quantizes_activations(x.shape[0], x.device)
    return triton.block_fp8_matmul(x, weight, scale_inv, quantize_activations)
