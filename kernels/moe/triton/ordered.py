"""What comes before the grouped products of some hundred pairs, in one launch: tiles by expert, tokens rounded to FP8.

Each expert is one program, which looks at all the ids twice: to count its pairs and those of the experts before it,
then to place its own. Where an expert's tiles begin follows from these two numbers alone: expert e, with P pairs before
it, begins at tile e + P // BLOCK_M, which leaves room for all tiles before it, since each expert wastes less than one.
So no program waits for what another one counts; a tile between two experts may stay unused. No atomics: equal inputs
give equal bits.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...dispatch import interpreting
from ...gemm.reference import FP8_MAX, GROUP
from ...gemm.triton import round_tokens
from ...integers import cdiv
from ..ways import scan_of
from .align import Tiles
from .apart import room_for

_ROWS = 8  # of a group of columns that one program rounds


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs", "num_tiles", "num_tokens"])
def _ordered_kernel(
    ids_ptr,
    pairs_ptr,
    experts_ptr,
    x_ptr,
    codes_ptr,
    factors_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    num_tokens,
    K,
    num_groups,
    x_stride,
    BLOCK_M: tl.constexpr,
    SCAN: tl.constexpr,
    ROUND: tl.constexpr,
    ROWS: tl.constexpr,
    FP8_MAX: tl.constexpr,
    GROUP: tl.constexpr,
    EARLY: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """The first programs see to an expert's tiles each, others (ROUND) to a group of some tokens' values."""
    if EARLY:
        cuda.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < num_experts:
        lanes = tl.arange(0, SCAN)
        before = tl.zeros([SCAN], dtype=tl.int32)
        mine = tl.zeros([SCAN], dtype=tl.int32)
        for begin in range(0, num_pairs, SCAN):
            ids = tl.load(ids_ptr + begin + lanes, mask=begin + lanes < num_pairs, other=-1)
            before += ((ids >= 0) & (ids < program)).to(tl.int32)
            mine += (ids == program).to(tl.int32)
        pairs_before, count = tl.sum(before, axis=0), tl.sum(mine, axis=0)
        first = program + pairs_before // BLOCK_M
        used = (count + BLOCK_M - 1) // BLOCK_M
        following = program + 1 + (pairs_before + count) // BLOCK_M
        following = tl.where(program == num_experts - 1, num_tiles, following)
        for begin in range(0, following - first, SCAN):
            tile = begin + lanes
            tl.store(experts_ptr + first + tile, tl.where(tile < used, program, -1), mask=tile < following - first)
        position = first.to(tl.int64) * BLOCK_M
        padding = count + tl.arange(0, BLOCK_M)
        tl.store(pairs_ptr + position + padding, num_pairs, mask=padding < used * BLOCK_M)
        for begin in range(0, tl.where(count > 0, num_pairs, 0), SCAN):
            ids = tl.load(ids_ptr + begin + lanes, mask=begin + lanes < num_pairs, other=-1)
            here = ids == program
            order = tl.cumsum(here.to(tl.int32), axis=0)
            tl.store(pairs_ptr + position + order - 1, begin + lanes, mask=here)
            position += tl.sum(here.to(tl.int32), axis=0)
    if ROUND:
        if program >= num_experts:
            block = program - num_experts
            rows = (block // num_groups).to(tl.int64) * ROWS + tl.arange(0, ROWS)
            round_tokens(
                x_ptr, codes_ptr, factors_ptr, rows, block % num_groups, num_tokens, K, num_groups, x_stride, FP8_MAX,
                GROUP, INTERPRETED,
            )  # fmt: skip


def tiles_in_order(
    topk_ids: torch.Tensor, num_experts: int, block_m: int, x: torch.Tensor, rounds: bool, early: bool = False
) -> tuple[Tiles, torch.Tensor, torch.Tensor | None]:
    """The pairs of topk_ids [M, k] by expert, stably, in tiles of block_m; other ids than [0, num_experts) stay out.

    Unused tiles lie between the others. With `rounds` x [M, H], of last stride 1, becomes codes and factors, the same
    bits as of `quantize_tokens`; else it comes back as it is, without factors. early: lets the
    next launch begin.
    """
    ids, (tokens, hidden) = topk_ids.reshape(-1), x.shape
    num_pairs, groups = ids.numel(), cdiv(hidden, GROUP)
    num_tiles = num_experts + num_pairs // block_m
    tiles, codes, factors = room_for(num_tiles, block_m, x, rounds)
    _ordered_kernel[(num_experts + (cdiv(tokens, _ROWS) * groups if rounds else 0),)](
        ids,
        tiles.pairs,
        tiles.experts,
        x,
        codes,
        x if factors is None else factors,
        num_pairs,
        num_experts,
        num_tiles,
        tokens,
        hidden,
        groups,
        x.stride(0),
        BLOCK_M=block_m,
        SCAN=scan_of(num_pairs),
        ROUND=rounds,
        ROWS=_ROWS,
        FP8_MAX=FP8_MAX,
        GROUP=GROUP,
        EARLY=early,
        INTERPRETED=interpreting() and not x.is_cuda,
        num_warps=4,
    )
    return tiles, codes, factors
