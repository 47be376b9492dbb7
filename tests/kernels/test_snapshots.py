"""States kept besides: within a prefill, after a decode step; and the windows of a verification that moves no state."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from qwen3next_plugin.kernels import conv, gdn
from tests.helpers import nan_like

from .common import BACKENDS, DTYPES
from .gdn_case import Tokens, assert_error, formula, limit, make_tokens
from .slots import (
    STATE_LAYOUTS,
    Row,
    assert_only_these_slots_changed,
    assert_only_these_tokens_written,
    bits,
    clone_layout,
    column_slice,
    fill_slots,
    ints,
    poisoned_state,
    ranges,
    strided_slots,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DIM, WIDTH = 10, 4
# Out of order, an empty row, a skipped one; the token 5 is in no row.
ROWS = [(6, 139, 3), (6, 6, 0), (139, 141, 1), (0, 5, -1), (141, 205, 4)]
# Within a row, at its end, none asked for, of a skipped row, of an empty one.
SNAPSHOTS = {0: (128, 8), 1: (64, 7), 2: (2, -1), 3: (5, 9), 4: (64, 10)}
SLOTS = 12


def snapshots(wanted: dict[int, tuple[int, int]], rows: int, device: str, dtype: torch.dtype) -> dict[str, Tensor]:
    positions, slots = zip(*(wanted.get(n, (0, -1)) for n in range(rows)), strict=True)
    return {
        "snapshot_positions": ints(positions, device, dtype),
        "snapshot_slots": ints(slots, device, dtype),
    }


def windows_of(x: Tensor, history: Tensor | None, row: Row, taken: int) -> Tensor:
    """[D, W - 1]: the inputs up to token `taken` of the row, oldest first."""
    before = x.new_zeros(WIDTH - 1, DIM) if history is None else history.T.to(x.dtype)
    inputs = torch.cat([before, x[row[0] : row[0] + taken]])
    return inputs[inputs.shape[0] - (WIDTH - 1) :].T


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("index", [torch.int32, torch.int64])
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
def test_windows_within_a_prefill(layout: str, index: torch.dtype, backend: str, device: str) -> None:
    x = column_slice(206, DIM, torch.float32, device)
    state = poisoned_state((SLOTS, DIM, 5), x.dtype, device, layout)
    fill_slots(state, [3, 1])
    before, out = clone_layout(state), nan_like(206, DIM, device=device)
    wanted = SNAPSHOTS | {2: (1, 11)}  # shorter than the window: some of it is history
    conv.causal_conv1d_prefill(
        x,
        torch.randn(DIM, WIDTH, device=device),
        None,
        state,
        **ranges(ROWS, device),
        state_slots=strided_slots([slot for _, _, slot in ROWS], device),
        has_initial_state=torch.tensor([True, True, True, True, False], device=device),
        out=out,
        **snapshots(wanted, len(ROWS), device, index),
        backend=backend,
    )
    for n, (taken, slot) in {0: wanted[0], 2: wanted[2], 4: wanted[4]}.items():
        history = before[ROWS[n][2], :, : WIDTH - 1] if n != 4 else None
        assert torch.equal(state[slot, :, : WIDTH - 1], windows_of(x, history, ROWS[n], taken))
        assert torch.equal(bits(state[slot, :, WIDTH - 1 :]), bits(before[slot, :, WIDTH - 1 :]))
        own = windows_of(x, history, ROWS[n], ROWS[n][1] - ROWS[n][0])
        assert torch.equal(state[ROWS[n][2], :, : WIDTH - 1], own)
    assert_only_these_slots_changed(before, state, [3, 1, 4, 8, 11, 10])
    assert_only_these_tokens_written(out, ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_windows_after_decode(dtype: torch.dtype, backend: str, device: str) -> None:
    rows = [(3, 4, 2), (0, 1, 5), (1, 1, 0), (1, 2, -1), (4, 5, 1)]
    x = column_slice(6, DIM, dtype, device)
    state = poisoned_state((SLOTS, DIM, WIDTH - 1), dtype, device)
    fill_slots(state, [2, 5, 1])
    before, out = clone_layout(state), nan_like(6, DIM, dtype=dtype, device=device)
    conv.causal_conv1d_update(
        x,
        torch.randn(DIM, WIDTH, device=device).to(dtype),
        None,
        state,
        **ranges(rows, device),
        state_slots=ints([slot for _, _, slot in rows], device),
        num_accepted_tokens=None,
        max_query_len=1,
        out=out,
        snapshot_slots=ints([7, -1, 8, 9, 10], device),
        backend=backend,
    )
    for n, kept in ((0, 7), (4, 10)):
        assert torch.equal(state[kept], windows_of(x, before[rows[n][2]], rows[n], 1))
        assert torch.equal(state[kept], state[rows[n][2]])
    assert_only_these_slots_changed(before, state, [2, 5, 1, 7, 10])
    assert_only_these_tokens_written(out, rows)


def prefill(
    tokens: Tokens, state: Tensor, rows: Sequence[Row], has_state: Sequence[bool], backend: str, **kept: Tensor
) -> Tensor:
    out = tokens.out()
    gdn.gdn_prefill(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, tokens.device),
        max_query_len=max(end - start for start, end, _ in rows),
        state_slots=strided_slots([slot for _, _, slot in rows], tokens.device),
        has_initial_state=torch.tensor(has_state, device=tokens.device),
        out=out,
        backend=backend,
        **kept,
    )
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
def test_states_within_a_prefill(layout: str, state_dtype: torch.dtype, backend: str, device: str) -> None:
    check_states_within(make_tokens(206, device, heads=(1, 1)), layout, state_dtype, backend)


def check_states_within(tokens: Tokens, layout: str, state_dtype: torch.dtype, backend: str) -> None:
    """A prefill of ROWS with their SNAPSHOTS, against the formula; nothing else may move."""
    device, state = tokens.device, tokens.state(SLOTS, state_dtype, layout)
    fill_slots(state, [3, 1], 0.3)
    before, has_state = clone_layout(state), [True, True, True, True, False]
    wanted = SNAPSHOTS | {2: (1, 11)}  # neither where a chunk ends nor where the row does: not to be had
    kept = snapshots(wanted, len(ROWS), device, torch.int32 if layout == "pages" else torch.int64)
    out = prefill(tokens, state, ROWS, has_state, backend, **kept)
    allowed = limit(state_dtype, tokens, backend, True)
    for n in (0, 4):
        (start, end, own), (taken, slot) = ROWS[n], wanted[n]
        initial = before[own] if has_state[n] else None
        assert_error(state[slot], formula(tokens, start, start + taken, initial)[1][-1], allowed, f"snapshot {slot}")
        o, states = formula(tokens, start, end, initial)
        assert_error(state[own], states[-1], allowed, f"slot {own}")
        assert_error(out[start:end], o, limit(out.dtype, tokens, backend, True), f"tokens {start}..{end}")
    assert_only_these_slots_changed(before, state, [3, 1, 4, 8, 10])
    assert_only_these_tokens_written(out, ROWS)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_snapshot_changes_no_bit_of_a_prefill(backend: str, device: str) -> None:
    check_no_bit_changes(make_tokens(130, device), backend)


def check_no_bit_changes(tokens: Tokens, backend: str) -> None:
    """A prefill of 130 tokens with a snapshot and without."""
    device = tokens.device
    states = [tokens.state(4), tokens.state(4)]
    outs = [
        prefill(tokens, states[0], [(0, 130, 1)], [False], backend),
        prefill(tokens, states[1], [(0, 130, 1)], [False], backend, **snapshots({0: (64, 2)}, 1, device, torch.int32)),
    ]
    if backend == "triton":  # the reference takes a sequence in two, and sums in another order
        assert torch.equal(*outs) and torch.equal(states[0][1], states[1][1])
    assert_error(outs[1], outs[0].cpu().double(), 1e-6, "outputs")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_states_after_decode(state_dtype: torch.dtype, backend: str, device: str) -> None:
    rows = [(3, 4, 2), (0, 1, 5), (1, 1, 0), (1, 2, -1), (4, 5, 1)]
    tokens = make_tokens(6, device)
    state, out = tokens.state(SLOTS, state_dtype), tokens.out()
    fill_slots(state, [2, 5, 1])
    before = clone_layout(state)
    gdn.gdn_decode(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, device),
        state_slots=ints([slot for _, _, slot in rows], device),
        out=out,
        snapshot_slots=ints([7, -1, 8, 9, 10], device),
        backend=backend,
    )
    for n, kept in ((0, 7), (4, 10)):
        start, _, own = rows[n]
        expected = formula(tokens, start, start + 1, before[own])[1][-1]
        assert_error(state[kept], expected, limit(state_dtype, tokens, backend), f"snapshot {kept}")
        assert torch.equal(bits(state[kept]), bits(state[own]))
    assert_only_these_slots_changed(before, state, [2, 5, 1, 7, 10])
    assert_only_these_tokens_written(out, rows)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"snapshot_slots": None}, "snapshot_slots is None, but snapshot_positions, snapshot_slots come together"),
        ({"snapshot_slots": torch.zeros(2, dtype=torch.int32)}, r"snapshot_slots has shape \(2,\); \(1,\) is needed"),
        ({"snapshot_positions": torch.zeros(1)}, "snapshot_positions is torch.float32"),
    ],
)
def test_bad_snapshots_are_named(change: dict[str, Tensor], message: str) -> None:
    tokens = make_tokens(4, "cpu")
    kept = snapshots({0: (4, 2)}, 1, "cpu", torch.int32)
    with pytest.raises(ValueError, match=message):
        prefill(tokens, tokens.state(4), [(0, 4, 1)], [False], "reference", **(kept | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype: torch.dtype, device: str) -> None:
    tokens = make_tokens(1000, device, heads=(16, 32), dims=(128, 128), dtype=dtype)
    rows = [(0, 513, 1), (513, 514, 2), (600, 964, 0), (514, 600, 4)]
    state = tokens.state(SLOTS)
    fill_slots(state, [1, 0], 0.3)
    before, has_state = clone_layout(state), [True, False, True, False]
    wanted = {0: (512, 5), 2: (64, 6), 3: (86, 7)}
    prefill(tokens, state, rows, has_state, "triton", **snapshots(wanted, 4, device, torch.int64))
    for n, (taken, slot) in wanted.items():
        start, _, own = rows[n]
        expected = formula(tokens, start, start + taken, before[own] if has_state[n] else None)[1][-1]
        assert_error(state[slot], expected, limit(state.dtype, tokens, "triton", True), f"snapshot {slot}")
    assert_only_these_slots_changed(before, state, [1, 2, 0, 4, 5, 6, 7])
