"""Which format a weight is in, read from its dtype and its scale's shape, and whether both fit: for all products.

Recognised: float8_e4m3fn with a factor a block or a row (`reference.block_size`), int8 (INT8) and uint8 (INT4, two
codes a byte) with a factor a row and group of columns (`integer`).
"""

import torch

from .integer import MIN_GROUP, SCALES, dequantize_int4, dequantize_int8, quantize_int8_tokens
from .reference import FP8, block_size, dequantize_block, dequantize_tokens, quantize_tokens

INT4 = torch.uint8  # what holds the codes
INT8 = torch.int8
QUANTIZED = (FP8, INT8, INT4)
_WORD = 8  # INT4 codes that kernels read at a time


def columns_of(weight: torch.Tensor) -> int:
    """K of weight [..., N, K]: INT4 codes lie two a byte."""
    return weight.shape[-1] * (2 if weight.dtype is INT4 else 1)


def group_of(weight: torch.Tensor, scale: torch.Tensor) -> int:
    """Columns that one factor of an INT4 or INT8 weight covers, both taken as checked."""
    return columns_of(weight) // scale.shape[-1]


def check_quantized(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, names: tuple[str, str, str]
) -> None:
    """Raise ValueError, calling the tensors by `names`, unless weight [..., N, K] is quantised and the others fit it.

    INT4 and INT8: scale [..., N, K/G] float32, float16 or bfloat16 with G dividing K, at least 16 unless it is K; zero
    (INT4 only) uint8 of the same shape. FP8: float32 blocks or rows, no zero.
    """
    named, named_scale, named_zero = names
    if zero is not None and weight.dtype is not INT4:
        raise ValueError(f"{named_zero} was given with {named} {weight.dtype}; only INT4 weights (uint8) have zeros")
    if weight.dtype is FP8:
        if scale.shape[:-2] != weight.shape[:-2] or scale.dim() != weight.dim():
            raise ValueError(f"{named_scale} is {list(scale.shape)} for {named} {list(weight.shape)}; they do not fit")
        block_size(weight, scale, named_scale)
        return
    if weight.dtype not in (INT8, INT4):
        raise ValueError(f"{named} is {weight.dtype}; with scales it must be {', '.join(map(str, QUANTIZED))}")
    columns = columns_of(weight)
    held = f"{named} {list(weight.shape)} ({columns} columns of {'INT4' if weight.dtype is INT4 else 'INT8'})"
    if weight.dtype is INT4 and columns % _WORD:
        raise ValueError(f"{held}: INT4 columns must be a multiple of {_WORD}")
    groups = scale.shape[-1] if scale.dim() else 0
    if scale.shape[:-1] != weight.shape[:-1] or groups < 1 or columns % groups:
        raise ValueError(
            f"{named_scale} is {list(scale.shape)} for {held}; it must be {[*weight.shape[:-1], 'K/G']}, G dividing "
            f"{columns}"
        )
    if groups > 1 and columns // groups < MIN_GROUP:
        raise ValueError(
            f"{named_scale} is {list(scale.shape)} for {held}: groups of {columns // groups}; at least {MIN_GROUP} "
            "columns must share a scale"
        )
    if scale.dtype not in SCALES:
        raise ValueError(f"{named_scale} is {scale.dtype}; it must be {' or '.join(map(str, SCALES))}")
    if zero is not None and (zero.dtype is not torch.uint8 or zero.shape != scale.shape):
        raise ValueError(
            f"{named_zero} is {zero.dtype} {list(zero.shape)}; it must be uint8 {list(scale.shape)}, one zero a scale"
        )


def check_rounding(
    quantize_activations: bool, weight: torch.Tensor, scale: torch.Tensor, names: tuple[str, str]
) -> None:
    """Raise ValueError if activations are to be rounded for a quantised weight that meets them as they are."""
    if not quantize_activations or weight.dtype is FP8:
        return
    named, named_scale = names
    if weight.dtype is INT4:
        raise ValueError(f"quantize_activations: {named} is INT4, which takes activations as they are: leave it out")
    if scale.shape[-1] != 1:
        raise ValueError(
            f"quantize_activations: {named_scale} is {list(scale.shape)}; INT8 activations need one scale a row of "
            f"{named}, {[*weight.shape[:-1], 1]}"
        )


def dequantize(
    weight: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values [..., N, K] of a quantised weight of any format, as `dtype`."""
    if weight.dtype is INT4:
        return dequantize_int4(weight, scale, zero, dtype)
    if weight.dtype is INT8:
        return dequantize_int8(weight, scale, dtype)
    return dequantize_block(weight, scale, dtype)


def round_activations(x: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x [..., K] as `dtype` after rounding as it meets this weight: to INT8 by tokens, or to FP8 by 1x128 groups."""
    if weight.dtype is INT8:
        return dequantize_int8(*quantize_int8_tokens(x), dtype)
    return dequantize_tokens(*quantize_tokens(x), dtype)


def quantized_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
    quantize_activations: bool = False,
) -> torch.Tensor:
    """x [..., K] @ dequantize(weight [N, K]).T, float32 inside, x's dtype out."""
    compute = torch.promote_types(x.dtype, torch.float32)
    values = round_activations(x, weight, compute) if quantize_activations else x.to(compute)
    return (values @ dequantize(weight, scale, zero, compute).mT).to(x.dtype)
