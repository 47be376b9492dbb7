"""Verification of draft tokens: the state after every token in its own slot, and rollback by choice of slot."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen3next_plugin.kernels import gdn

from .common import BACKENDS, DTYPES
from .gdn_case import Tokens, assert_error, decode, formula, limit, make_tokens, verify
from .slots import (
    STATE_LAYOUTS,
    Row,
    assert_only_these_slots_changed,
    assert_only_these_tokens_written,
    clone_layout,
    fill_slots,
    ints,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def check_verify(
    tokens: Tokens,
    rows: Sequence[Row],
    output_slots: Sequence[Sequence[int]],
    backend: str | None,
    state_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    slots: int = 12,
) -> None:
    """Verify and compare every output and every state with the formula; other slots and tokens keep their poison."""
    state, out = tokens.state(slots, state_dtype, layout), tokens.out()
    running = [
        (row, targets) for row, targets in zip(rows, output_slots, strict=True) if row[2] >= 0 and row[1] > row[0]
    ]
    fill_slots(state, [row[2] for row, _ in running], 0.3)
    before = clone_layout(state)
    verify(tokens, state, rows, output_slots, out, backend)
    written = []
    for (start, end, slot), targets in running:
        o, states = formula(tokens, start, end, before[slot], every_state=True)
        assert_error(out[start:end], o, limit(out.dtype, tokens, backend), f"tokens {start}..{end}")
        for j in range(end - start):
            if targets[j] >= 0:
                written.append(targets[j])
                assert_error(state[targets[j]], states[j], limit(state_dtype, tokens, backend), f"after token {j}")
    assert_only_these_slots_changed(before, state, written)
    assert_only_these_tokens_written(out, rows)


# A full row that starts from one of its own output slots, a short one, an empty one, a skipped one; token 4 is in none.
ROWS = [(5, 8, 3), (0, 2, 7), (2, 2, 0), (2, 4, -1), (8, 9, 9)]
OUTPUT_SLOTS = [[2, 3, 4], [7, -1, 6], [0, 0, 0], [1, 1, 1], [9, 10, 11]]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4)])
def test_ragged_rows(heads: tuple[int, int], backend: str, device: str) -> None:
    check_verify(make_tokens(9, device, heads), ROWS, OUTPUT_SLOTS, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    check_verify(make_tokens(9, device, (1, 1)), ROWS, OUTPUT_SLOTS, backend, state_dtype, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    check_verify(make_tokens(9, device, (1, 1), (12, 20), dtype), ROWS, OUTPUT_SLOTS, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_rollback_is_sequential_decode(accepted: int, backend: str, device: str) -> None:
    """Three drafts are verified and `accepted` tokens kept; what follows equals decoding the kept tokens one by one.

    Verification and decode are one kernel with float32 state, so equal to the bit.
    """
    drafted, real = make_tokens(4, device, (1, 2)), make_tokens(8, device, (1, 2))
    drafted.A_log, drafted.dt_bias = real.A_log, real.dt_bias
    for wrong, right in zip((drafted.mixed_qkv, drafted.a, drafted.b), (real.mixed_qkv, real.a, real.b), strict=True):
        wrong[:accepted] = right[:accepted]
    state = drafted.state(6)
    fill_slots(state, [1])
    plain, plain_out = clone_layout(state), real.out()
    verify(drafted, state, [(0, 4, 1)], [[1, 2, 3, 4]], drafted.out(), backend)
    out = real.out()
    verify(real, state, [(accepted, 8, accepted)], [[1, 2, 3, 4, 5, 0, 0]], out, backend)
    for t in range(8):
        decode(real, plain, [(t, t + 1, 1)], plain_out, backend)
    assert torch.equal(out[accepted:], plain_out[accepted:])
    o, _ = formula(real, 0, 8, None)
    assert out.shape == o.shape


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rounds_of_drafting(backend: str, device: str) -> None:
    """Rounds with varying acceptance over one set of slots, as an engine runs them, follow the formula to the end."""
    tokens, slots = make_tokens(14, device, (1, 1)), [4, 2, 0]
    state, out = tokens.state(5), tokens.out()
    fill_slots(state, [4])
    o, _ = formula(tokens, 0, 14, state[4].clone())
    at, initial = 0, 4
    for accepted in (1, 3, 2, 2, 1, 3):
        verify(tokens, state, [(at, at + 3, initial)], [slots], out, backend)
        assert_error(out[at : at + 3], o[at : at + 3], limit(out.dtype, tokens, backend), f"round at {at}")
        initial = slots[accepted - 1]
        at += accepted


@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_ragged_batch(backend: str, device: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3), label="lengths")
    pool = iter(data.draw(st.permutations(range(12)), label="slots"))
    rows, output_slots, at = [], [], 0
    for length in lengths:
        own = [next(pool) for _ in range(3)]
        start = data.draw(st.sampled_from([*own, -1]), label="initial slot")
        rows.append((at, at + length, start))
        output_slots.append([data.draw(st.sampled_from([slot, -1])) for slot in own])
        at += length
    check_verify(make_tokens(at + 1, device, heads=(1, 1)), rows, output_slots, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: str) -> None:
    check_verify(make_tokens(2, device), [(0, 0, 1), (0, 2, -1)], [[0, 1], [2, 3]], backend)
    check_verify(make_tokens(0, device), [(0, 0, 1)], [[0, 1]], backend)


def verify_arguments(tokens: Tokens, state: Tensor) -> dict[str, Any]:
    return {
        "ssm_state": state,
        "num_k_heads": 1,
        "query_start": ints([0], tokens.device),
        "query_end": ints([2], tokens.device),
        "max_query_len": 2,
        "initial_slots": ints([0], tokens.device),
        "output_slots": torch.tensor([[0, 1]], dtype=torch.int32, device=tokens.device),
        "out": tokens.out(),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_query_len": 3}, r"max_query_len is 3, but output_slots of shape \(1, 2\)"),
        ({"output_slots": torch.zeros(1, dtype=torch.int32)}, r"output_slots has shape \(1,\)"),
        (
            {"output_slots": torch.zeros(2, 2, dtype=torch.int32)},
            r"output_slots has shape \(2, 2\); \(1, 2\) is needed",
        ),
        ({"initial_slots": torch.zeros(1, 1, dtype=torch.int32)}, r"initial_slots has shape \(1, 1\)"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    tokens = make_tokens(2, "cpu")
    with pytest.raises(ValueError, match=message):
        gdn.gdn_verify(*tokens.arguments(), **(verify_arguments(tokens, tokens.state(3)) | change))


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_real_shapes(state_dtype: torch.dtype, device: str) -> None:
    tokens = make_tokens(9, device, (16, 32), (128, 128), torch.bfloat16)
    check_verify(tokens, ROWS, OUTPUT_SLOTS, None, state_dtype, "pages")


@pytest.mark.gpu
def test_a_captured_graph_follows_new_rows(device: str) -> None:
    """Captured with one set of rows and replayed with another: nothing about the rows is baked into the graph."""
    tokens = make_tokens(6, device, (2, 4), (128, 128), torch.bfloat16)
    state, out = tokens.state(8), tokens.out()
    fill_slots(state, range(8), 0.3)
    start, arguments = clone_layout(state), verify_arguments(tokens, state)
    arguments |= {"num_k_heads": 2, "max_query_len": 3, "out": out}
    arguments["query_start"], arguments["query_end"] = ints([0, 0], device), ints([0, 0], device)
    arguments["initial_slots"] = ints([-1, -1], device)
    arguments["output_slots"] = torch.full((2, 3), -1, dtype=torch.int32, device=device)
    gdn.gdn_verify(*tokens.arguments(), **arguments)  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gdn.gdn_verify(*tokens.arguments(), **arguments)
    arguments["query_start"].copy_(ints([0, 3], device))
    arguments["query_end"].copy_(ints([3, 5], device))
    arguments["initial_slots"].copy_(ints([1, 4], device))
    arguments["output_slots"].copy_(torch.tensor([[1, 2, 3], [4, 5, 6]], dtype=torch.int32))
    graph.replay()
    for row, slot, last in ((slice(0, 3), 1, 3), (slice(3, 5), 4, 5)):
        o, states = formula(tokens, row.start, row.stop, start[slot])
        assert_error(out[row], o, limit(out.dtype, tokens, None), f"row at {row.start}")
        assert_error(state[last], states[-1], limit(state.dtype, tokens, None), f"slot {last}")
