"""Ragged batches on the GPU: how a program finds its row without the host knowing any length.

Ranges are disjoint, so ``ceil(tokens / chunk) + rows`` programs are always enough, whatever the lengths are: the
grid then depends on shapes alone and nothing is copied to the host.
"""

import triton
import triton.language as tl

from .integers import cdiv

BLOCK_ROWS = 128


def max_chunks(tokens: int, rows: int, chunk: int, max_query_len: int | None = None) -> int:
    """How many chunks of ``chunk`` tokens ``rows`` disjoint ranges over ``tokens`` tokens can have at most."""
    bound = cdiv(tokens, chunk) + rows
    if max_query_len is None:
        return bound
    return min(bound, rows * cdiv(max_query_len, chunk))


@triton.jit
def locate_chunk(
    program, query_start, query_end, slots, slots_stride, num_rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr
):
    """The row and the chunk within it that fall to ``program``; row -1 if none does. Skipped rows have no chunks."""
    row = -1
    chunk = 0
    before = 0
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        valid = rows < num_rows
        start = tl.load(query_start + rows, mask=valid, other=0)
        end = tl.load(query_end + rows, mask=valid, other=0)
        slot = tl.load(slots + rows * slots_stride, mask=valid, other=-1)
        length = tl.where((slot >= 0) & (end > start), end - start, 0).to(tl.int32)
        count = (length + CHUNK - 1) // CHUNK
        last = before + tl.cumsum(count, 0)
        mine = (program >= last - count) & (program < last)
        row = tl.maximum(row, tl.max(tl.where(mine, rows, -1), 0))
        chunk += tl.sum(tl.where(mine, program - (last - count), 0), 0)
        before += tl.sum(count, 0)
    return row, chunk


@triton.jit
def covered(tokens, query_start, query_end, max_query_len, slots, slots_stride, num_rows, BLOCK: tl.constexpr):
    """1 for each of `tokens` that is among the first `max_query_len` of a row that is not skipped, else 0."""
    found = (tokens < 0).to(tl.int32)
    for first in range(0, num_rows, BLOCK):
        rows = first + tl.arange(0, BLOCK)
        valid = rows < num_rows
        start = tl.load(query_start + rows, mask=valid, other=0).to(tl.int64)
        end = tl.load(query_end + rows, mask=valid, other=0).to(tl.int64)
        slot = tl.load(slots + rows.to(tl.int64) * slots_stride, mask=valid, other=-1).to(tl.int64)
        here = (start[None, :] <= tokens[:, None]) & (tokens[:, None] < tl.minimum(end, start + max_query_len)[None, :])
        found = tl.maximum(found, tl.max((here & (slot >= 0)[None, :]).to(tl.int32), 1))
    return found
