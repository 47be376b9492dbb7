"""Slots and rows of the request table."""

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops import slots


def test_slots_go_into_the_table_and_come_back() -> None:
    table = torch.full((4, 8), -1, dtype=torch.int32)
    requests, start, end = torch.tensor([3, 1]), torch.tensor([2, 0]), torch.tensor([5, 2])
    given = torch.tensor([10, 11, 12, 13, 14])
    slots.assign_req_to_token_pool_cpu(requests, table, start, end, given, 8)
    assert table[3].tolist() == [-1, -1, 10, 11, 12, -1, -1, -1] and table[1].tolist() == [13, 14] + [-1] * 6
    assert (table[[0, 2]] == -1).all()
    back = torch.full_like(given, -5)
    slots.assign_extend_cache_locs_cpu(requests, table, start, end, back, 8)
    assert torch.equal(back, given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
def test_moved_slots_are_read_before_they_are_written(dtype: torch.dtype) -> None:
    buffers = [torch.arange(24).to(dtype).view(6, 2, 2).contiguous() for _ in range(3)]
    before = buffers[0].clone()
    addresses = torch.tensor([buffer.data_ptr() for buffer in buffers])
    strides = torch.tensor([buffer.stride(0) * buffer.element_size() for buffer in buffers])
    source, target = torch.tensor([1, 2, 3]), torch.tensor([2, 3, 4])  # a chain that overlaps itself
    slots.copy_all_layer_kv_cache_cpu(addresses, strides, target, source)
    expected = before.clone()
    expected[target] = before[source]
    assert all(torch.equal(buffer, expected) for buffer in buffers)
