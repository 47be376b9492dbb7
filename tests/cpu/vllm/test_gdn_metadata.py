"""Which rows of a step run chunked and which token by token, and from which state block each starts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm.config import CUDAGraphMode
from vllm.v1.attention.backend import CommonAttentionMetadata
from vllm.v1.kv_cache_interface import MambaSpec

from qwen3next_plugin.kernels.gdn.step import RecurrentRows
from qwen3next_plugin.vllm_integration.gdn_metadata import Qwen3NextGdnMetadataBuilder, _GraphBuffers

BLOCK = 16


def make_builder(drafts: int = 0, mode: str = "none", graphs: bool = False) -> Qwen3NextGdnMetadataBuilder:
    speculative = SimpleNamespace(num_speculative_tokens=drafts, parallel_drafting=False) if drafts else None
    config: Any = SimpleNamespace(
        speculative_config=speculative,
        cache_config=SimpleNamespace(mamba_cache_mode=mode),
        compilation_config=SimpleNamespace(
            cudagraph_mode=CUDAGraphMode.FULL if graphs else CUDAGraphMode.NONE, max_cudagraph_capture_size=8
        ),
        scheduler_config=SimpleNamespace(max_num_seqs=4),
        parallel_config=SimpleNamespace(decode_context_parallel_size=1),
        use_v2_model_runner=False,
    )
    spec = MambaSpec(
        shapes=((3, 8), (1, 4, 4)),
        dtypes=(torch.float32, torch.float32),
        block_size=BLOCK,
        num_speculative_blocks=drafts,
    )
    return Qwen3NextGdnMetadataBuilder(spec, ["layer"], config, torch.device("cpu"))


def make_step(
    query: list[int], computed: list[int], table: list[list[int]], prompt: list[bool]
) -> CommonAttentionMetadata:
    """A step of so many tokens after so many computed ones; `prompt`: is the request still in its prompt?"""
    lengths, start = torch.tensor(query), torch.tensor([0, *query]).cumsum(0).int()
    seq_lens = (lengths + torch.tensor(computed)).int()
    return CommonAttentionMetadata(
        query_start_loc=start,
        query_start_loc_cpu=start,
        seq_lens=seq_lens,
        seq_lens_cpu_upper_bound=seq_lens,
        num_reqs=len(query),
        num_actual_tokens=sum(query),
        max_query_len=max(query),
        max_seq_len=int(seq_lens.max()),
        block_table_tensor=torch.tensor(table, dtype=torch.int32),
        slot_mapping=torch.zeros(sum(query), dtype=torch.int64),
        is_prefilling=torch.tensor(prompt),
    )


def test_decode_rows_come_first_and_prompts_follow() -> None:
    step = make_step([1, 1, 5, 7], [9, 3, 0, 16], [[4], [5], [6], [7]], [False, False, True, True])
    rows = make_builder().build(0, step)
    assert rows.recurrent is not None and rows.prefill is not None
    assert rows.recurrent.query_start.tolist() == [0, 1] and rows.recurrent.query_end.tolist() == [1, 2]
    assert rows.recurrent.initial_slots.tolist() == [4, 5]
    assert rows.recurrent.num_accepted_tokens is None
    assert rows.prefill.query_start.tolist() == [2, 7] and rows.prefill.query_end.tolist() == [7, 14]
    assert rows.prefill.state_slots.tolist() == [6, 7]
    assert rows.prefill.has_initial_state.tolist() == [False, True]
    assert rows.prefill.max_query_len == 7
    packed = rows.prefill.packed
    assert packed is not None and packed.first == 2 and packed.lengths == (5, 7)
    assert packed.cu_seqlens.tolist() == [0, 5, 12]


def test_prompts_with_other_rows_between_them_are_not_packed() -> None:
    step = make_step([6, 1, 4, 5, 1], [0, 9, 0, 0, 8], [[3], [4], [5], [6], [7]], [True, False, True, True, False])
    rows = make_builder().build(0, step)
    assert rows.prefill is not None and rows.prefill.query_start.tolist() == [0, 7, 11]
    assert rows.prefill.packed is None


def test_any_order_and_the_first_token_of_a_one_token_prompt() -> None:
    """A one-token prompt has no state yet: as a decode row it would start from what its block last held."""
    step = make_step([6, 1, 1, 1], [0, 0, 8, 30], [[3], [4], [5], [6]], [True, True, False, True])
    rows = make_builder().build(0, step)
    assert rows.prefill is not None and rows.recurrent is not None
    assert rows.prefill.state_slots.tolist() == [3, 4]
    assert rows.prefill.has_initial_state.tolist() == [False, False]
    assert rows.prefill.packed is not None and rows.prefill.packed.lengths == (6, 1)  # decode rows come behind
    assert rows.recurrent.initial_slots.tolist() == [5, 6]
    assert rows.recurrent.query_start.tolist() == [7, 8]


def test_verify_starts_from_the_last_accepted_block() -> None:
    table = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
    step = make_step([3, 1, 2], [10, 20, 30], table, [False] * 3)
    accepted, drafts = torch.tensor([3, 2, 1], dtype=torch.int32), torch.tensor([2, 0, 1], dtype=torch.int32)
    rows = make_builder(drafts=2).build(0, step, accepted, drafts)
    assert rows.prefill is None and rows.recurrent is not None
    # The second request got no drafts, and still starts where its last step's accepted draft left the state.
    assert rows.recurrent.initial_slots.tolist() == [3, 5, 7]
    assert rows.recurrent.conv_slots.tolist() == [1, 4, 7]
    assert rows.recurrent.output_slots.tolist() == table
    assert rows.recurrent.num_accepted_tokens is not None
    assert rows.recurrent.num_accepted_tokens.tolist() == [3, 2, 1]
    assert rows.recurrent.max_query_len == 3


def test_a_prompt_beside_drafts_runs_chunked_whatever_its_length() -> None:
    step = make_step([1, 3], [15, 40], [[1, 2, 3], [4, 5, 6]], [True, False])
    accepted, drafts = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([-1, 2], dtype=torch.int32)
    rows = make_builder(drafts=2).build(0, step, accepted, drafts)
    assert rows.prefill is not None and rows.recurrent is not None
    assert rows.prefill.state_slots.tolist() == [1] and rows.prefill.has_initial_state.tolist() == [True]
    assert rows.recurrent.initial_slots.tolist() == [5]


def test_with_the_prefix_cache_the_block_follows_the_position() -> None:
    """Column c of the table holds the state after (c + 1) * BLOCK tokens; a step runs in its last token's column."""
    table = [list(range(10, 20)), list(range(20, 30))]
    step = make_step([1, 1], [BLOCK - 1, BLOCK], table, [False, False])
    rows = make_builder(mode="align").build(0, step)
    assert rows.recurrent is not None
    assert rows.recurrent.initial_slots.tolist() == [10, 21]


@pytest.mark.parametrize("drafts", [0, 2])
def test_graphs_replay_at_fixed_addresses_and_padding_does_nothing(drafts: int) -> None:
    builder = make_builder(drafts=drafts, graphs=True)
    width = 1 + drafts
    table = [[1 + i * width + j for j in range(width)] for i in range(3)]
    captured = builder.build_for_cudagraph_capture(make_step([width] * 3, [0] * 3, table, [False] * 3)).recurrent
    assert captured is not None
    step = make_step([width, width, 0], [5, 9, 0], table[::-1], [False] * 3)
    extra = (torch.tensor([width, 1, 0]), torch.tensor([drafts, drafts, -1])) if drafts else ()
    replayed = builder.build(0, step, *extra).recurrent
    assert replayed is not None
    for name in ("query_start", "query_end", "conv_slots", "initial_slots", "output_slots"):
        assert getattr(replayed, name).data_ptr() == getattr(captured, name).data_ptr(), name
    assert captured.query_start.tolist() == [0, width, 2 * width]
    assert captured.query_end.tolist() == [width, 2 * width, 2 * width]  # the last row is empty
    assert captured.initial_slots[:2].tolist() == [table[2][width - 1], table[1][0]]


@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_for_graphs_are_held_at_the_same_places_step_after_step(drafts: int) -> None:
    buffers = _GraphBuffers(4, 1 + drafts, torch.device("cpu"))
    places: list[list[int]] = []
    for step in range(2):
        starts = torch.tensor([0, 1, 2, 3], dtype=torch.int32) * (1 + drafts) + step
        slots = torch.arange(3 * (1 + drafts), dtype=torch.int32).view(3, -1) + 10 * step
        accepted = torch.tensor([1, 2, 1], dtype=torch.int32) if drafts else None
        initial = slots[:, 0] if accepted is None else slots.gather(1, (accepted - 1).long()[:, None])[:, 0]
        asked = RecurrentRows(starts[:-1], starts[1:], slots[:, 0], initial, slots, accepted, 1 + drafts)
        held = buffers.hold(asked, starts)
        for name in ("query_start", "query_end", "conv_slots", "initial_slots", "output_slots", "num_accepted_tokens"):
            wanted, found = getattr(asked, name), getattr(held, name)
            assert (wanted is None) == (found is None)
            assert wanted is None or torch.equal(wanted, found), name
        assert held.max_query_len == asked.max_query_len
        kept = (held.query_start, held.query_end, held.conv_slots, held.initial_slots, held.output_slots)
        places.append([tensor.data_ptr() for tensor in kept])
    assert places[0] == places[1]
