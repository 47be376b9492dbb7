"""Quantisation and matrix products with FP8, INT8 and INT4 weights."""

import torch

from .. import dispatch
from . import formats, reference
from .few import MAX_ROWS, UNEVEN_ROWS, few_matmul, few_matmul_of_norm, few_matmul_pair, fits_few, runs_few
from .formats import check_quantized, check_rounding, columns_of
from .policy import INTEGERS, fp8_choices, quantizes_activations
from .reference import FP8, block_size, dequantize_block, has_row_factors, quantize_block

__all__ = [
    "FP8",
    "MAX_ROWS",
    "UNEVEN_ROWS",
    "block_fp8_matmul",
    "block_size",
    "dequantize_block",
    "few_matmul",
    "few_matmul_of_norm",
    "few_matmul_pair",
    "fits_few",
    "quantize_block",
    "quantize_tokens",
    "quantized_matmul",
    "runs_few",
]

dispatch.declare("quantize_tokens")
dispatch.declare("quantized_matmul", cuda=(INTEGERS,))
dispatch.declare("block_fp8_matmul", cuda=fp8_choices)


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
    or one factor a row, [N, 1]: see `block_size`) -> [M, N] in x's dtype. quantize_activations rounds x to FP8 by 1x128
    groups first; None decides by M and the GPU (`policy.quantizes_activations`), and never rounds on a CPU or where
    rows have factors. Raises ValueError for shapes that do not fit.
    """
    _check_matmul(x, weight, scale_inv)
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return reference.block_fp8_matmul(x, weight, scale_inv, bool(quantize_activations))
    from . import triton

    if quantize_activations is None:
        rounds = quantizes_activations(x.shape[0], x.device)
        quantize_activations = rounds and not has_row_factors(weight, scale_inv)
    return triton.block_fp8_matmul(x, weight, scale_inv, quantize_activations)


def _quantized_matmul_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    quantize_activations: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@dispatch.custom_op(fake=_quantized_matmul_fake)
def quantized_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    *,
    quantize_activations: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """x @ ((code - zero) * scale).T with INT4 or INT8 weights, accumulated in float32.

    x [T, K] bf16/fp16/fp32; weight uint8 [N, K/2] (INT4, low nibble first, K a multiple of 8) or int8 [N, K]; scale
    [N, K/G] of any float type, G dividing K and at least 16; zero uint8 like scale, None: 8 (INT4) or 0 -> [T, N] in
    x's dtype. Weights are widened to x's dtype, exactly where 32 columns or more share a scale, else after their
    factor. quantize_activations (INT8, G = K) rounds x to INT8 by tokens and sums in int32. Raises ValueError for
    shapes or dtypes that do not fit. Formats: see `integer`.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != columns_of(weight):
        raise ValueError(
            f"quantized_matmul: x is {list(x.shape)} and weight is {weight.dtype} {list(weight.shape)}; they must be "
            "[T, K] and [N, K], INT4 (uint8) [N, K/2]"
        )
    if weight.dtype is FP8:
        raise ValueError("quantized_matmul: weight is FP8; use block_fp8_matmul, which takes factors a row too")
    check_quantized(weight, scale, zero, ("weight", "scale", "zero"))
    check_rounding(quantize_activations, weight, scale, ("weight", "scale"))
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return formats.quantized_matmul(x, weight, scale, zero, quantize_activations)
    from . import triton_integer

    return triton_integer.quantized_matmul(x, weight, scale, zero, quantize_activations)
