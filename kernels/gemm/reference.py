"""FP8 (E4M3) quantisation with block scales, as formulas in plain torch.

A scale is the factor that gives the value back: value = code * scale. Weights carry one scale a 128x128 block
(`scale_inv` in checkpoints), activations one a token and group of 128 columns. DeepSeek-V3 report, 2024, section 3.3.2.
"""

import torch
from torch.nn import functional

FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0  # largest finite E4M3 value
BLOCK = 128
GROUP = 128


def has_row_factors(weight: torch.Tensor, scale_inv: torch.Tensor) -> bool:
    """Whether scale_inv [..., N, 1] holds a factor for each of the rows of weight [..., N, K]."""
    return tuple(scale_inv.shape[-2:]) == (weight.shape[-2], 1)


def block_size(weight: torch.Tensor, scale_inv: torch.Tensor, name: str = "scale_inv") -> tuple[int, int]:
    """The (rows, columns) one scale covers: in each dimension the largest power of two up to 128 that fits the shapes.

    A scale [..., N, 1] is one a row: (1, a power of two that no row is longer than).

    weight [..., N, K], scale_inv [..., blocks of N, blocks of K]. A tensor-parallel shard whose rows do not end on a
    block of 128 carries smaller blocks (64 for gate and up of 64 rows each), and its scale's shape says so. Raises
    ValueError, naming the tensor `name`, when no power of two fits.
    """

    if has_row_factors(weight, scale_inv):
        return 1, max(BLOCK, 1 << (weight.shape[-1] - 1).bit_length())

    def fit(size: int, blocks: int) -> int:
        for candidate in (128, 64, 32, 16):
            if -(-size // candidate) == blocks:
                return candidate
        raise ValueError(
            f"{name} is {list(scale_inv.shape)} for a weight {list(weight.shape)}; with blocks of 128 it must end in "
            f"{[-(-n // BLOCK) for n in weight.shape[-2:]]}"
        )

    return fit(weight.shape[-2], scale_inv.shape[-2]), fit(weight.shape[-1], scale_inv.shape[-1])


def _expand(scale: torch.Tensor, rows: int, cols: int, block: tuple[int, int]) -> torch.Tensor:
    return scale.repeat_interleave(block[0], dim=-2)[..., :rows, :].repeat_interleave(block[1], dim=-1)[..., :cols]


def _scales(peak: torch.Tensor) -> torch.Tensor:
    return torch.where(peak > 0, peak / FP8_MAX, 1.0)  # an all-zero block is exact under any scale


def quantize_block(weight: torch.Tensor, block: tuple[int, int] = (BLOCK, BLOCK)) -> tuple[torch.Tensor, torch.Tensor]:
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


def dequantize_block(weight: torch.Tensor, scale_inv: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """FP8 codes [..., N, K] times their block's factor, as `dtype`; the shapes tell the block size."""
    rows, cols = weight.shape[-2:]
    compute = torch.promote_types(dtype, torch.float32)
    factors = _expand(scale_inv.to(compute), rows, cols, block_size(weight, scale_inv))
    return (weight.to(compute) * factors).to(dtype)


def quantize_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """x [..., K] -> (float8_e4m3fn [..., K], scale float32 [..., ceil(K/128)]): one scale a row and 128 columns."""
    cols = x.shape[-1]
    values = x.to(torch.float32)
    groups = functional.pad(values, (0, -cols % GROUP)).unflatten(-1, (-(-cols // GROUP), GROUP))
    scale = _scales(groups.abs().amax(dim=-1))
    expanded = scale.repeat_interleave(GROUP, dim=-1)[..., :cols]
    return (values / expanded).clamp(-FP8_MAX, FP8_MAX).to(FP8), scale


def dequantize_tokens(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """The values that `quantize_tokens` stands for, as `dtype` (float32 or wider)."""
    return codes.to(dtype) * scale.to(dtype).repeat_interleave(GROUP, dim=-1)[..., : codes.shape[-1]]


def block_fp8_matmul(
    x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor, quantize_activations: bool = False
) -> torch.Tensor:
    """x [..., K] @ dequantize_block(weight [N, K]).T, float32 inside, x's dtype out.

    With quantize_activations, x is first rounded to FP8 by `quantize_tokens`.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    values = dequantize_tokens(*quantize_tokens(x), compute) if quantize_activations else x.to(compute)
    return (values @ dequantize_block(weight, scale_inv, compute).mT).to(x.dtype)
