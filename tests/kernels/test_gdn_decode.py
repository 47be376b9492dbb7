"""Decode by one token: in place, any batch, any state layout, against the float64 formula."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gdn

from .common import BACKENDS, DTYPES
from .gdn_case import Tokens, assert_error, decode, formula, limit, make_tokens, run_prefill
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


def check_decode(
    tokens: Tokens,
    rows: Sequence[Row],
    backend: str | None,
    state_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
) -> None:
    state, out = tokens.state(6, state_dtype, layout), tokens.out()
    running = [row for row in rows if row[2] >= 0 and row[1] > row[0]]
    fill_slots(state, [slot for _, _, slot in running], 0.3)
    before = clone_layout(state)
    decode(tokens, state, rows, out, backend)
    for start, end, slot in running:
        o, states = formula(tokens, start, end, before[slot])
        assert_error(out[start:end], o, limit(out.dtype, tokens, backend), f"token {start}")
        assert_error(state[slot], states[-1], limit(state_dtype, tokens, backend), f"slot {slot}")
    assert_only_these_slots_changed(before, state, [slot for _, _, slot in running])
    assert_only_these_tokens_written(out, rows)


# Out of order, an empty row, a skipped one, and tokens 2 and 5 in no row.
ROWS = [(3, 4, 2), (0, 1, 5), (1, 1, 0), (1, 2, -1), (4, 5, 1)]


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one(backend: str, device: str) -> None:
    check_decode(make_tokens(1, device), [(0, 1, 3)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4), (2, 4), (4, 8)])
def test_ragged_rows(heads: tuple[int, int], backend: str, device: str) -> None:
    check_decode(make_tokens(6, device, heads), ROWS, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    check_decode(make_tokens(6, device), ROWS, backend, state_dtype, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (12, 20), (24, 40), (5, 3)])
def test_token_dtypes_and_head_dims(dims: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    check_decode(make_tokens(3, device, dims=dims, dtype=dtype), [(0, 1, 3), (2, 3, 1)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: str) -> None:
    check_decode(make_tokens(2, device), [], backend)
    check_decode(make_tokens(2, device), [(0, 0, 1), (0, 1, -1)], backend)
    check_decode(make_tokens(0, device), [(0, 0, 1)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_decode_continues_prefill(backend: str, device: str) -> None:
    tokens, slot = make_tokens(70, device), 2
    state, out = tokens.state(4), tokens.out()
    run_prefill(tokens, state, [(0, 66, slot)], [False], backend)
    for t in range(66, 70):
        decode(tokens, state, [(t, t + 1, slot)], out, backend)
    o, states = formula(tokens, 0, 70, None)
    assert_error(out[66:], o[66:], limit(out.dtype, tokens, backend, True), "decoded tokens")
    assert_error(state[slot], states[-1], limit(state.dtype, tokens, backend, True), "state")


@given(slots=st.lists(st.integers(-1, 5), min_size=1, max_size=4, unique_by=lambda s: s if s >= 0 else object()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch(backend: str, device: str, slots: list[int]) -> None:
    tokens = make_tokens(len(slots), device, heads=(1, 1))
    check_decode(tokens, [(t, t + 1, slot) for t, slot in enumerate(slots)], backend)


def test_bad_arguments_are_named() -> None:
    tokens = make_tokens(2, "cpu")
    rows = {"query_start": ints([0, 1], "cpu"), "query_end": ints([1, 2], "cpu")}
    with pytest.raises(ValueError, match=r"state_slots has shape \(1,\); \(2,\) is needed"):
        gdn.gdn_decode(
            *tokens.arguments(),
            tokens.state(3),
            num_k_heads=1,
            **rows,
            state_slots=ints([0], "cpu"),
            out=tokens.out(),
        )
    with pytest.raises(ValueError, match="query_end has stride 2; a contiguous vector of 2 rows"):
        gdn.gdn_decode(
            *tokens.arguments(),
            tokens.state(3),
            num_k_heads=1,
            query_start=rows["query_start"],
            query_end=ints([1, 0, 2, 0], "cpu")[::2],
            state_slots=ints([0, 1], "cpu"),
            out=tokens.out(),
        )


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 6])
def test_real_shapes(rows: int, state_dtype: torch.dtype, device: str) -> None:
    tokens = make_tokens(rows, device, heads=(16, 32), dims=(128, 128), dtype=torch.bfloat16)
    check_decode(tokens, [(t, t + 1, t) for t in range(rows)], None, state_dtype, "pages")
