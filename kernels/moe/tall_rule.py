"""From how many tokens on the products of FP8 blocks run by `triton.tall`, and in which tiles: measured, no file's.

Tall tiles are 128 rows of one expert. Of gate and up, 64 rows are a program: 64 columns of each in one product. Of
down, 128 rows are: each half that has a row in use.
"""

from __future__ import annotations

import torch

from ..dispatch import Choice
from ..gemm.reference import GROUP
from ..gpus import Target
from ..offers import capability_of
from .config import MoeConfig, Tile
from .peers import has_whole_blocks

CAPABILITY = (9, 0)  # whose times are known; its shared memory holds the stages
MIN_TOKENS = 2048  # of 513 experts: 40 rows an expert; with 512 tokens, 16 rows a tile are as quick by either kernel
TILES = MoeConfig(64, Tile(64, 128, 4, 4), Tile(128, 128, 4, 3))
"""Rows of a product; columns of gate, and of up, together in one; columns of down."""


def runs_tall(tokens: int, w13: torch.Tensor, w13_scale: torch.Tensor | None) -> bool:
    """Whether so many tokens, rounded to FP8, meet experts of such weights in tall tiles."""
    return tokens >= MIN_TOKENS and capability_of(w13.device) == CAPABILITY and has_whole_blocks(w13, w13_scale)


def tall_choices(target: Target) -> list[Choice]:
    """For the table of what runs, on that GPU."""
    if target.capability != CAPABILITY:
        return []
    return [
        Choice(
            f"from {MIN_TOKENS} tokens, FP8 blocks of {GROUP}, if both of an expert's widths are multiples of it",
            why="sorted and rounded; gate and up in one product, down's weights read once for up to 128 rows",
            tiles="its own, of no file",
        )
    ]
