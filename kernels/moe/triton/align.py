"""Sorting (token, expert) pairs by expert on the GPU: no host sync, no atomics, a grid known from the shapes alone.

The pairs of one expert are laid out in tiles of BLOCK_M, the last one padded, so that a tile of the grouped product
meets one expert's weights only. Pairs are counted in chunks, and placed by how many of their expert came before them:
in the chunk, in the chunks before it, and in all experts before theirs. Some hundred pairs are sorted in `ordered`.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...integers import cdiv, next_power_of_2
from ..ways import max_tiles

_CHUNK = 128  # pairs that are compared with each other, one a thread
_SCAN = 1024  # tiles that are written at a time


@dataclass(frozen=True)
class Tiles:
    """Pairs sorted by expert. A pair p stands for token p // top_k and its choice p % top_k.

    pairs [max_tiles * block_m] int32: pair numbers, or the number of pairs where a tile is padded;
    experts [max_tiles] int32: each tile's expert, or -1 for an unused tile (whose pairs are not set).
    """

    pairs: torch.Tensor
    experts: torch.Tensor
    block_m: int

    @property
    def max_tiles(self) -> int:
        return self.experts.shape[0]


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs", "num_tiles"])
def _place_kernel(
    counts_ptr,
    pairs_ptr,
    experts_ptr,
    starts_ptr,
    num_pairs,
    num_experts,
    num_tiles,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    SCAN: tl.constexpr,
):
    """Each expert's tiles, their padding, and where its pairs begin."""
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
    tl.store(starts_ptr + expert, position)


@triton.jit(do_not_specialize=["num_pairs"])
def _chunk_count_kernel(
    ids_ptr, counts_ptr, ranks_ptr, num_pairs, num_experts, CHUNK: tl.constexpr, BLOCK_E: tl.constexpr
):
    """counts[chunk, e]: pairs of each expert in a chunk; ranks[pair]: how many of its expert are before it there.

    A thread compares its own pair with all others (columns, where threads lie side by side, are the own ones): sums
    across threads would be shuffles, of which a multiprocessor starts one a cycle.
    """
    chunk = tl.program_id(0).to(tl.int64)
    counts_ptr += chunk * num_experts
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + experts, 0, mask=experts < num_experts)
    lanes = tl.arange(0, CHUNK)
    inside = lanes < num_pairs - tl.program_id(0) * CHUNK
    ids = tl.load(ids_ptr + chunk * CHUNK + lanes, mask=inside, other=-1)
    # one sum for two: pairs of the same expert from the 16th bit on, and below it those of them that come before
    vote = tl.where(lanes[:, None] < lanes[None, :], 65537, 65536)
    votes = tl.sum(tl.where(ids[:, None] == ids[None, :], vote, 0), axis=0)
    ranks, of_expert = votes % 65536, votes // 65536
    tl.store(ranks_ptr + chunk * CHUNK + lanes, ranks, mask=inside)
    tl.debug_barrier()  # the zeros are written
    last = (ranks == of_expert - 1) & (ids >= 0) & (ids < num_experts)
    tl.store(counts_ptr + ids, of_expert, mask=last)


@triton.jit(do_not_specialize=["num_chunks"])
def _running_count_kernel(counts_ptr, totals_ptr, num_chunks, num_experts, CHUNKS: tl.constexpr, EXPERTS: tl.constexpr):
    """Each chunk's counts become those of the chunks before it; totals [E]: those of all chunks."""
    experts = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    total = tl.zeros([EXPERTS], dtype=tl.int32)
    for begin in range(0, num_chunks, CHUNKS):
        chunks = begin + tl.arange(0, CHUNKS)
        inside = (chunks < num_chunks)[:, None] & (experts < num_experts)[None, :]
        places = counts_ptr + chunks.to(tl.int64)[:, None] * num_experts + experts[None, :]
        counts = tl.load(places, mask=inside, other=0)
        tl.store(places, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=inside)
        total += tl.sum(counts, axis=0)
    tl.store(totals_ptr + experts, total, mask=experts < num_experts)


@triton.jit(do_not_specialize=["num_pairs"])
def _chunk_place_kernel(
    ids_ptr,
    ranks_ptr,
    before_ptr,
    starts_ptr,
    pairs_ptr,
    num_pairs,
    num_experts,
    CHUNK: tl.constexpr,
    EARLY: tl.constexpr,
):
    if EARLY:
        cuda.gdc_launch_dependents()
    chunk = tl.program_id(0).to(tl.int64)
    pairs = chunk * CHUNK + tl.arange(0, CHUNK)
    ids = tl.load(ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    held = (ids >= 0) & (ids < num_experts)
    place = tl.load(starts_ptr + ids, mask=held, other=0) + tl.load(ranks_ptr + pairs, mask=held, other=0)
    place += tl.load(before_ptr + chunk * num_experts + ids, mask=held, other=0)
    tl.store(pairs_ptr + place, pairs.to(tl.int32), mask=held)


def align(topk_ids: torch.Tensor, num_experts: int, block_m: int, early: bool = False) -> tuple[Tiles, torch.Tensor]:
    """Sort the pairs of topk_ids [M, k] by expert, stably, in tiles of block_m; other ids than [0, E) stay out.

    Unused tiles come last. Returns the number of each expert's pairs too, [E] int32. early: lets the next launch begin.
    """
    ids = topk_ids.reshape(-1)
    num_pairs = ids.numel()
    num_tiles = max_tiles(num_pairs, num_experts, block_m)
    counts = torch.empty(num_experts, dtype=torch.int32, device=ids.device)
    pairs = torch.empty(num_tiles * block_m, dtype=torch.int32, device=ids.device)
    experts = torch.empty(num_tiles, dtype=torch.int32, device=ids.device)
    starts = torch.empty(num_experts, dtype=torch.int64, device=ids.device)
    block_e, chunks = next_power_of_2(num_experts), cdiv(num_pairs, _CHUNK)
    before = torch.empty((chunks, num_experts), dtype=torch.int32, device=ids.device)
    ranks = torch.empty(num_pairs, dtype=torch.int32, device=ids.device)
    _chunk_count_kernel[(chunks,)](
        ids, before, ranks, num_pairs, num_experts, CHUNK=_CHUNK, BLOCK_E=block_e, num_warps=_CHUNK // 32
    )
    _running_count_kernel[(cdiv(num_experts, 8),)](
        before, counts, chunks, num_experts, CHUNKS=256, EXPERTS=8, num_warps=8
    )
    _place_kernel[(num_experts,)](
        counts,
        pairs,
        experts,
        starts,
        num_pairs,
        num_experts,
        num_tiles,
        BLOCK_M=block_m,
        BLOCK_E=block_e,
        SCAN=_SCAN,
        num_warps=4,
    )
    _chunk_place_kernel[(chunks,)](
        ids,
        ranks,
        before,
        starts,
        pairs,
        num_pairs,
        num_experts,
        CHUNK=_CHUNK,
        EARLY=early,
        num_warps=4,
    )
    return Tiles(pairs, experts, block_m), counts
