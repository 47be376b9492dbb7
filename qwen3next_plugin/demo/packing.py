"""Integer-quantised tensors as AutoAWQ, GPTQ's tools and compressed-tensors write them, rounded to nearest."""

from collections.abc import Iterator

import torch
from torch import Tensor

from qwen3next_plugin.kernels.gemm.integer import quantize_int4, quantize_int8, unpack_nibbles
from qwen3next_plugin.spec import IntegerFormat

AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""The column behind each nibble of an int32 of AWQ's, lowest bits first."""


def packed_tensors(module: str, weight: Tensor, stored: IntegerFormat) -> Iterator[tuple[str, Tensor]]:
    """The checkpoint's tensors for a linear layer ``weight`` [N, K], quantised to ``stored``; scales in its dtype."""
    group = stored.group_size or weight.shape[1]
    if stored.bits == 4:
        packed, scale, zero = quantize_int4(weight, group, stored.symmetric)
        codes = unpack_nibbles(packed)
    else:
        signed, scale = quantize_int8(weight, group)
        if stored.packing == "int-quantized":
            yield f"{module}.weight", signed
            yield f"{module}.weight_scale", scale
            return
        codes, zero = (signed.to(torch.int16) + 128).to(torch.uint8), None
    if zero is None:
        zero = torch.full(scale.shape, 1 << (stored.bits - 1), dtype=torch.uint8)
    match stored.packing:
        case "awq":
            yield f"{module}.qweight", _words(_awq_order(codes.t()), 4)
            yield f"{module}.qzeros", _words(_awq_order(zero.t()), 4)
            yield f"{module}.scales", scale.t().contiguous()
        case "gptq" | "gptq_v2":
            yield f"{module}.qweight", _words(codes, stored.bits).t().contiguous()
            # The first format cannot say 0, and what it reads for 15 is disputed.
            zero = zero.clamp(min=1) - 1 if stored.packing == "gptq" else zero
            yield f"{module}.qzeros", _words(zero.t(), stored.bits)
            yield f"{module}.scales", scale.t().contiguous()
            yield f"{module}.g_idx", (torch.arange(weight.shape[1]) // group).to(torch.int32)
        case _:
            yield f"{module}.weight_packed", _words(codes, stored.bits)
            yield f"{module}.weight_scale", scale
            if not stored.symmetric:
                yield f"{module}.weight_zero_point", _words(zero.t(), stored.bits).t().contiguous()
            yield f"{module}.weight_shape", torch.tensor(weight.shape)


def _awq_order(codes: Tensor) -> Tensor:
    return codes.unflatten(-1, (-1, 8))[..., list(AWQ_ORDER)].flatten(-2)


def _words(codes: Tensor, bits: int) -> Tensor:
    """Codes [R, C] -> int32 [R, C * bits / 32], the first column in the lowest bits; zeros fill the last word up."""
    count = 32 // bits
    padded = torch.nn.functional.pad(codes.to(torch.int64), (0, -codes.shape[-1] % count)).unflatten(-1, (-1, count))
    words = (padded << (bits * torch.arange(count))).sum(dim=-1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).to(torch.int32)
