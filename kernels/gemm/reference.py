"""FP8 (E4M3) quantisation with block scales, as formulas in plain torch.

A scale is the factor that gives the value back: value = code * scale. Weights carry one scale a 128x128 block
(`scale_inv` in checkpoints), activations one a token and group of 128 columns. DeepSeek-V3 report, 2024, section 3.3.2.
"""

import torch
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite E4M3 value
BLOCK = 128


def _expand(scale: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    return scale.repeat_interleave(block[0], dim=-2)[..., :rows, :].repeat_interleave(block[1], dim=-1)[..., :cols]


def _scales(peak: torch.Tensor) -> torch.Tensor:
    return torch.where(peak > 0, peak / FP8_MAX, 1.0)  # an all-zero block is exact under any scale


def quantize_block(
    weight: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)
) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] -> (float8_e4m3fn [..., N, K], scale_inv float32 [..., ceil(N/block), ceil(K/block)]).

    Each block's largest magnitude becomes 448. Blocks at the edge may be partial.
    """
    rows, cols = weight.shape[-2:]
    w = weight.to(torch.float32)
    padded = functional.pad(w, (0, -cols % block[1], 0, -rows % block[0]))
    tiles = padded.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0]))
    scale = _scales(tiles.abs().amax(dim=(-3, -1)))
    codes = (w / _expand(scale, rows, cols, block)).clamp(-FP8_MAX, FP8_MAX).to(FP8)
    return codes, scale


def dequantize_block(
    weight: torch.Tensor,
    scale_inv: torch.Tensor,
    dtype: torch.dtype = torch.float32,
    block: tuple[int, int] = (BLOCK, BLOCK),
) -> torch.Tensor:
    """FP8 codes [..., N, K] times their block's factor [..., ceil(N/block), ceil(K/block)], in float32 at least."""
    rows, cols = weight.shape[-2:]
    compute = torch.promote_types(dtype, torch.float32)
    return (weight.to(compute) * _expand(scale_inv.to(compute), rows, cols, block)).to(dtype)


def quantize_tokens(x: torch.Tensor, group: int = BLOCK) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (float8_e4m3fn [..., K], scale float32 [..., ceil(K/group)]): one scale a row and column group."""
    cols = x.shape[-1]
    values = x.to(torch.float32)
    groups = functional.pad(values, (0, -cols % group)).unflatten(-1, (-1, group))
    scale = _scales(groups.abs().amax(dim=-1))
    expanded = scale.repeat_interleave(group, dim=-1)[..., :cols]
    return (values / expanded).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def block_fp8_matmul(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor) -> torch.Tensor:
    """x [..., K] @ dequantize_block(weight [N, K]).T; activations are not quantised, float32 inside, x's dtype out."""
    compute = torch.promote_types(x.dtype, torch.float32)
    return (x.to(compute) @ dequantize_block(weight, scale_inv, compute).mT).to(x.dtype)
