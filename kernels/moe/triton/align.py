"""Sorting (token, expert) pairs by expert on the GPU: no host sync, no atomics, a grid known from the shapes alone.

The pairs of one expert are laid out in tiles of BLOCK_M, the last one padded, so that a tile of the grouped product
meets one expert's weights only. Every expert is one program, which scans all the ids twice: to count, then to place.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from ..ways import scan_of


@dataclass(frozen=True)
class Tiles:
    """Pairs sorted by expert. A pair p stands for token p // top_k and its choice p % top_k.

    pairs [max_tiles * block_m] int32: pair numbers, or the number of pairs where a tile is padded;
    experts [max_tiles] int32: each tile's expert, or -1 past the last used tile.
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    block_m: int

    @property
    def max_tiles(self) -> int:
        return self.experts.shape[0]


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most tiles any routing can need: each expert with a pair wastes less than one tile."""
    return min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def _count_kernel(ids_ptr, counts_ptr, num_pairs, SCAN: tl.constexpr):
    expert = tl.program_id(0)
    lanes = tl.arange(0, SCAN)
    count = tl.zeros([SCAN], dtype=tl.int32)
    for begin in range(0, num_pairs, SCAN):
        ids = tl.load(ids_ptr + begin + lanes, mask=begin + lanes < num_pairs, other=-1)
        count += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(count, axis=0))


@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_kernel(
    ids_ptr,
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCAN: tl.constexpr,
):
    expert = tl.program_id(0)
    others = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + others, mask=others < num_experts, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first_tile = tl.sum(tl.where(others < expert, tiles, 0), axis=0)
    my_tiles = tl.sum(tl.where(others == expert, tiles, 0), axis=0)
    my_pairs = tl.sum(tl.where(others == expert, counts, 0), axis=0)
    lanes = tl.arange(0, SCAN)
    for begin in range(0, my_tiles, SCAN):
        tl.store(experts_ptr + first_tile + begin + lanes, expert, mask=begin + lanes < my_tiles)
    if expert == num_experts - 1:
        for begin in range(first_tile + my_tiles, num_tiles, SCAN):
            tl.store(experts_ptr + begin + lanes, -1, mask=begin + lanes < num_tiles)
    position = first_tile.to(tl.int64) * BLOCK_M
    padding = tl.arange(0, BLOCK_M)
    unused = my_tiles * BLOCK_M - my_pairs
    tl.store(pairs_ptr + position + my_pairs + padding, num_pairs, mask=padding < unused)
    for begin in range(0, num_pairs, SCAN):
        ids = tl.load(ids_ptr + begin + lanes, mask=begin + lanes < num_pairs, other=-1)
        mine = ids == expert
        order = tl.cumsum(mine.to(tl.int32), axis=0)
        tl.store(pairs_ptr + position + order - 1, begin + lanes, mask=mine)
        position += tl.sum(mine.to(tl.int32), axis=0)


def align(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> Tiles:
    """Sort the pairs of topk_ids [M, k] by expert, stably, in tiles of block_m; other ids than [0, E) stay out."""
    ids = topk_ids.reshape(-1)
    num_pairs = ids.numel()
    num_tiles = max_tiles(num_pairs, num_experts, block_m)
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    pairs = torch.empty(num_tiles * block_m, dtype=torch.int32, device=ids.device)
    experts = torch.empty(num_tiles, dtype=torch.int32, device=ids.device)
    scan = scan_of(num_pairs)
    _count_kernel[(num_experts,)](ids, counts, num_pairs, SCAN=scan, num_warps=4)
    _place_kernel[(num_experts,)](
        ids,
        counts,
        pairs,
        experts,
        num_pairs,
        num_experts,
        num_tiles,
        BLOCK_M=block_m,
        BLOCK_E=triton.next_power_of_2(num_experts),
        SCAN=scan,
        num_warps=4,
    )
    return Tiles(pairs, experts, block_m)
