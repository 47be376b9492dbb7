"""How a program finds its row and chunk on the GPU: each chunk of each row exactly once, whatever the lengths."""

import torch
import triton
import triton.language as tl
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels.ranges import locate_chunk, max_chunks

CHUNK, BLOCK = 8, 2


@triton.jit
def _locate_kernel(found, query_start, query_end, slots, num_rows, CHUNK: tl.constexpr, BLOCK: tl.constexpr):
    program = tl.program_id(0)
    row, chunk = locate_chunk(program, query_start, query_end, slots, 1, num_rows, CHUNK, BLOCK)
    tl.store(found + 2 * program, row)
    tl.store(found + 2 * program + 1, chunk)


@given(rows=st.lists(st.tuples(st.integers(0, 12), st.booleans()), min_size=1, max_size=5))
def test_every_chunk_is_found_once(rows: list[tuple[int, bool]], device: str) -> None:
    lengths = torch.tensor([length for length, _ in rows])
    ends = lengths.cumsum(0)
    slots = torch.tensor([-1 if skipped else 5 for _, skipped in rows])
    programs = max_chunks(int(ends[-1]), len(rows), CHUNK)
    found = torch.full((programs, 2), -7, dtype=torch.int32, device=device)
    vectors = [t.to(device, torch.int32) for t in (ends - lengths, ends, slots)]
    _locate_kernel[(programs,)](found, *vectors, len(rows), CHUNK=CHUNK, BLOCK=BLOCK)
    expected = [
        (row, chunk)
        for row, (length, skipped) in enumerate(rows)
        if not skipped
        for chunk in range(-(-length // CHUNK))
    ]
    pairs = [tuple(pair) for pair in found.tolist()]
    assert pairs[: len(expected)] == expected
    assert all(row == -1 for row, _ in pairs[len(expected) :])


def test_the_bound_is_enough_and_not_wasteful() -> None:
    assert max_chunks(64, 1, 64) == 2
    assert max_chunks(8192, 2, 64, max_query_len=100) == 4
    assert max_chunks(130, 3, 64, max_query_len=4096) == 6
