"""What comes before the grouped products of a few tokens, in one launch: tiles of pairs, and tokens rounded to FP8.

Where pairs are so few that the grid has a tile for each of them anyway (`ways.apart`), experts need no order: a pair
that is the first of its expert, or the first that the expert's last tile does not hold, begins the tile of its own
number. A program finds that out by one look at all pairs. No atomics: equal inputs give equal bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...dispatch import interpreting
from ...gemm.policy import require_fp8_units
from ...gemm.reference import FP8, FP8_MAX, GROUP
from ...gemm.triton import round_tokens
from ...integers import cdiv
from ..ways import SHORT_SCAN
from .align import Tiles


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs", "num_tokens"])
def _apart_kernel(
    ids_ptr,
    pairs_ptr,
    experts_ptr,
    x_ptr,
    codes_ptr,
    factors_ptr,
    num_pairs,
    num_experts,
    num_tokens,
    K,
    num_groups,
    x_stride,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
    ROUND: tl.constexpr,
    FP8_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The first programs see to a pair's tile each, others (ROUND) to a group of a token's values."""
    if EARLY:
        cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < num_pairs:
        lanes = tl.arange(0, SCAN)
        expert = tl.load(ids_ptr + program)
        mine = tl.load(ids_ptr + lanes, mask=lanes < num_pairs, other=-1) == expert
        before = tl.sum((mine & (lanes < program)).to(tl.int32), axis=0)
        begins = (expert >= 0) & (expert < num_experts) & (before % BLOCK_M == 0)
        tl.store(experts_ptr + program, tl.where(begins, expert, -1))
        if begins:
            places = tl.cumsum(mine.to(tl.int32), axis=0) - 1 - before
            mine = mine & (places >= 0) & (places < BLOCK_M)
            tile = pairs_ptr + program * BLOCK_M
            tl.store(tile + places, lanes, mask=mine)
            padding = tl.arange(0, BLOCK_M)
            tl.store(tile + padding, num_pairs, mask=padding >= tl.sum(mine.to(tl.int32), axis=0))
    if ROUND:
        if program >= num_pairs:
            row = (program - num_pairs) // num_groups + tl.arange(0, 1)
            round_tokens(
                x_ptr, codes_ptr, factors_ptr, row.to(tl.int64), (program - num_pairs) % num_groups, num_tokens, K,
                num_groups, x_stride, FP8_MAX, GROUP, INTERPRETED,
            )  # fmt: skip


def room_for(
    num_tiles: int, block_m: int, x: torch.Tensor, rounds: bool
) -> tuple[Tiles, torch.Tensor, torch.Tensor | None]:
    """Tiles that are not set yet, and (rounds) as much room for codes and factors of x; else x itself, and None."""
    pairs = torch.empty(num_tiles * block_m, dtype=torch.int32, device=x.device)
    tiles = Tiles(pairs, torch.empty(num_tiles, dtype=torch.int32, device=x.device), block_m)
    if not rounds:
        return tiles, x, None
    require_fp8_units(x.device)
    factors = torch.empty((x.shape[0], cdiv(x.shape[1], GROUP)), dtype=torch.float32, device=x.device)
    return tiles, torch.empty(x.shape, dtype=FP8, device=x.device), factors


def tiles_apart(
    topk_ids: torch.Tensor, num_experts: int, block_m: int, x: torch.Tensor, rounds: bool, early: bool = False
) -> tuple[Tiles, torch.Tensor, torch.Tensor | None]:
    """The pairs of topk_ids [M, k] in tiles of block_m, one a pair where it begins one; other ids than [0, E) stay out.

    Only for numbers of pairs of which `ways.apart` says so. With `rounds` x [M, H], of last stride 1, becomes codes and
    factors, the same bits as of `quantize_tokens`; else it comes back as it is, without factors. early: lets the
    next launch begin.
    """
    ids, (tokens, hidden) = topk_ids.reshape(-1), x.shape
    num_pairs, groups = ids.numel(), cdiv(hidden, GROUP)
    tiles, codes, factors = room_for(num_pairs, block_m, x, rounds)
    _apart_kernel[(num_pairs + (tokens * groups if rounds else 0),)](
        ids,
        tiles.pairs,
        tiles.experts,
        x,
        codes,
        x if factors is None else factors,
        num_pairs,
        num_experts,
        tokens,
        hidden,
        groups,
        x.stride(0),
        BLOCK_M=block_m,
        SCAN=SHORT_SCAN,
        ROUND=rounds,
        FP8_MAX=FP8_MAX,
        GROUP=GROUP,
        EARLY=early,
        INTERPRETED=interpreting() and not x.is_cuda,
        num_warps=1,
    )
    return tiles, codes, factors
