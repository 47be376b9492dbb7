"""The short convolution: the formula, prefill in any pieces, and updates from any number of accepted tokens."""

from collections.abc import Sequence
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.kernels import conv
from qwen3next_plugin.kernels.conv.reference import causal_conv
from tests.helpers import nan_like, relative_error

from .common import BACKENDS, DTYPES, tolerance
from .slots import (
    STATE_LAYOUTS,
    Row,
    assert_only_these_slots_changed,
    assert_only_these_tokens_written,
    bits,
    clone_layout,
    column_slice,
    ints,
    poisoned_state,
    ranges,
    strided_slots,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
DIM = 10
# Out of order, an empty row, a skipped one, one shorter than the window; tokens 40 and 41 in no row.
ROWS = [(5, 40, 3), (5, 5, 0), (42, 44, 1), (0, 5, -1), (44, 45, 4)]


def formula(inputs: Tensor, weight: Tensor, bias: Tensor | None, silu: bool = True) -> Tensor:
    """[W - 1 + n, D] inputs, history first -> [n, D], in float64, as torch's own convolution has it."""
    x, w = inputs.cpu().double().T[None], weight.cpu().double()[:, None]
    y = functional.conv1d(x, w, None if bias is None else bias.cpu().double(), groups=x.shape[1])[0].T
    return y * torch.sigmoid(y) if silu else y


def make_weight(width: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A strided weight [D, W] and a bias."""
    return torch.randn(width, DIM, device=device).to(dtype).T, torch.randn(DIM, device=device).to(dtype)


def limit(x: Tensor, backend: str | None) -> float:
    return 1e-6 + tolerance(x.dtype, 1, backend or "reference", x.device.type)


def assert_stored(actual: Tensor, expected: Tensor, device: str, backend: str | None) -> None:
    """The state holds these inputs: exactly, but for the interpreter's truncation to bf16."""
    error = relative_error(actual, expected.cpu().double())
    assert error <= (0 if expected.dtype == actual.dtype else tolerance(actual.dtype, 1, backend or "", device))


def check_prefill(
    x: Tensor,
    rows: Sequence[Row],
    has_history: Sequence[bool],
    backend: str | None,
    width: int = 4,
    length: int = 5,
    state_dtype: torch.dtype | None = None,
    layout: str = "contiguous",
    use_bias: bool = False,
    activation: str | None = "silu",
) -> None:
    """Convolve rows from a poisoned state and compare all that must be written; nothing else may move."""
    device, columns = x.device.type, width - 1
    weight, bias = make_weight(width, device, x.dtype)
    state = poisoned_state((6, DIM, length), state_dtype or x.dtype, device, layout)
    running = [(row, has) for row, has in zip(rows, has_history, strict=True) if row[2] >= 0 and row[1] > row[0]]
    for (_, _, slot), has in running:
        if has:
            state[slot, :, :columns] = torch.randn(DIM, columns, device=device).to(state.dtype)
    before, out = clone_layout(state), nan_like(x.shape[0], DIM, dtype=x.dtype, device=device)
    conv.causal_conv1d_prefill(
        x,
        weight,
        bias if use_bias else None,
        state,
        **ranges(rows, device),
        state_slots=strided_slots([slot for _, _, slot in rows], device),
        has_initial_state=torch.tensor(has_history, dtype=torch.bool, device=device),
        out=out,
        activation=activation,
        backend=backend,
    )
    for (start, end, slot), has in running:
        history = before[slot, :, :columns].T.float() if has else x.new_zeros(columns, DIM).float()
        inputs = torch.cat([history, x[start:end].float()])
        expected = formula(inputs, weight, bias if use_bias else None, activation == "silu")
        assert relative_error(out[start:end], expected) <= limit(x, backend)
        kept = inputs[inputs.shape[0] - columns :].T
        assert_stored(state[slot, :, :columns], kept if state.dtype != x.dtype else kept.to(x.dtype), device, backend)
        assert torch.equal(bits(state[slot, :, columns:]), bits(before[slot, :, columns:]))
    assert_only_these_slots_changed(before, state, [row[2] for row, _ in running])
    assert_only_these_tokens_written(out, rows)


@pytest.mark.parametrize("width", [2, 3, 4])
def test_formula_with_and_without_history(width: int) -> None:
    x, history = torch.randn(2, 9, DIM), torch.randn(2, width - 1, DIM)
    weight, bias = make_weight(width, "cpu")
    y, last = causal_conv(x, weight, history, bias)
    for b in range(2):
        assert relative_error(y[b], formula(torch.cat([history[b], x[b]]), weight, bias)) <= 1e-6
    assert torch.equal(last, torch.cat([history, x], 1)[:, 9:])
    from_zeros, _ = causal_conv(x, weight, torch.zeros_like(history))
    assert torch.equal(causal_conv(x, weight)[0], from_zeros)


def test_formula_has_gradients() -> None:
    inputs = [torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((1, 3, 2), (2, 4), (1, 3, 2))]
    assert torch.autograd.gradcheck(lambda x, w, h: causal_conv(x, w, h), inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_history", [False, True])
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 15, 16, 17, 50])
def test_prefill_one_row(tokens: int, has_history: bool, backend: str, device: str) -> None:
    check_prefill(column_slice(tokens, DIM, torch.float32, device), [(0, tokens, 2)], [has_history], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("use_bias", [False, True])
def test_prefill_ragged_rows(use_bias: bool, width: int, backend: str, device: str) -> None:
    x = column_slice(47, DIM, torch.float32, device)
    activation = None if use_bias else "silu"
    has_history = [True, True, True, True, False]
    check_prefill(x, ROWS, has_history, backend, width, use_bias=use_bias, activation=activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_prefill_dtypes_and_layouts(dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    x = column_slice(47, DIM, dtype, device)
    check_prefill(x, ROWS, [True, True, False, True, True], backend, length=3, layout=layout)
    check_prefill(x, ROWS, [True, True, False, True, True], backend, state_dtype=torch.float32, layout=layout)


@pytest.mark.parametrize("backend", BACKENDS)
def test_prefill_in_pieces_is_at_once(backend: str, device: str) -> None:
    x = column_slice(40, DIM, torch.float32, device)
    weight, _ = make_weight(4, device)
    state, out = poisoned_state((2, DIM, 3), x.dtype, device), nan_like(40, DIM, device=device)
    for start, end in pairwise((0, 1, 3, 20, 22, 23, 40)):
        conv.causal_conv1d_prefill(
            x,
            weight,
            None,
            state,
            **ranges([(start, end, 1)], device),
            state_slots=ints([1], device),
            has_initial_state=torch.tensor([start > 0], device=device),
            out=out,
            backend=backend,
        )
    expected = formula(torch.cat([x.new_zeros(3, DIM), x]), weight, None)
    assert relative_error(out, expected) <= 1e-6
    assert torch.equal(state[1], x[37:].T)


def update(
    x: Tensor,
    weight: Tensor,
    state: Tensor,
    rows: Sequence[Row],
    accepted: Sequence[int] | None,
    max_query_len: int,
    out: Tensor,
    backend: str | None,
) -> None:
    conv.causal_conv1d_update(
        x,
        weight,
        None,
        state,
        **ranges(rows, x.device.type),
        state_slots=strided_slots([slot for _, _, slot in rows], x.device.type),
        num_accepted_tokens=None if accepted is None else ints(accepted, x.device.type),
        max_query_len=max_query_len,
        out=out,
        backend=backend,
    )


def check_update(
    x: Tensor,
    rows: Sequence[Row],
    accepted: Sequence[int] | None,
    backend: str | None,
    max_query_len: int,
    width: int = 4,
    layout: str = "contiguous",
) -> None:
    """Update rows whose window alone is not poisoned, and compare outputs and every column of the state."""
    device, columns = x.device.type, width - 1
    length = columns + 2 * max_query_len
    weight, _ = make_weight(width, device, x.dtype)
    state = poisoned_state((6, DIM, length), x.dtype, device, layout)
    first = [k - 1 for k in accepted] if accepted else [0] * len(rows)
    running = [(row, k) for row, k in zip(rows, first, strict=True) if row[2] >= 0 and row[1] > row[0]]
    for (_, _, slot), k in running:
        state[slot, :, k : k + columns] = torch.randn(DIM, columns, device=device).to(x.dtype)
    before, out = clone_layout(state), nan_like(x.shape[0], DIM, dtype=x.dtype, device=device)
    update(x, weight, state, rows, accepted, max_query_len, out, backend)
    for (start, end, slot), k in running:
        inputs = torch.cat([before[slot, :, k : k + columns].T, x[start:end]])
        assert relative_error(out[start:end], formula(inputs, weight, None)) <= limit(x, backend)
        written = inputs.shape[0] - 1
        assert torch.equal(state[slot, :, :written], inputs[1:].T)
        assert torch.equal(bits(state[slot, :, written:]), bits(before[slot, :, written:]))
    assert_only_these_slots_changed(before, state, [row[2] for row, _ in running])
    assert_only_these_tokens_written(out, rows)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_batch(dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    rows = [(3, 4, 2), (0, 1, 5), (1, 1, 0), (1, 2, -1), (4, 5, 1)]
    check_update(column_slice(6, DIM, dtype, device), rows, None, backend, 1, layout=layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 3, 4])
@pytest.mark.parametrize("accepted", [1, 2, 3, 4])
def test_windows_of_every_acceptance(accepted: int, width: int, backend: str, device: str) -> None:
    x = column_slice(9, DIM, torch.float32, device)
    rows = [(5, 9, 3), (0, 1, 1), (1, 1, 0), (1, 3, -1), (3, 5, 2)]
    check_update(x, rows, [accepted, 1, 2, 1, 5 - accepted], backend, 4, width)


@pytest.mark.parametrize("backend", BACKENDS)
def test_many_rounds_of_drafting(backend: str, device: str) -> None:
    """Prefill, then rounds of four tokens of which some are kept: always the convolution of the kept sequence."""
    x, weight = column_slice(30, DIM, torch.float32, device), make_weight(4, device)[0]
    state, out = poisoned_state((3, DIM, 6), x.dtype, device), nan_like(30, DIM, device=device)
    conv.causal_conv1d_prefill(
        x,
        weight,
        None,
        state,
        **ranges([(0, 2, 1)], device),
        state_slots=ints([1], device),
        has_initial_state=torch.tensor([False], device=device),
        out=out,
        backend=backend,
    )
    expected = formula(torch.cat([x.new_zeros(3, DIM), x]), weight, None)
    at, kept = 2, 1
    for accepted in (1, 4, 2, 3, 4, 1, 3):
        update(x, weight, state, [(at, at + 4, 1)], [kept], 4, out, backend)
        assert relative_error(out[at : at + 4], expected[at : at + 4]) <= 1e-6, f"round at token {at}"
        at, kept = at + accepted, accepted


@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_ragged_update(backend: str, device: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=5), label="lengths")
    slots = data.draw(st.permutations(range(6)), label="slots")
    accepted = data.draw(st.lists(st.integers(1, 3), min_size=len(lengths), max_size=len(lengths)), label="accepted")
    rows, at = [], 0
    for length, slot in zip(lengths, slots, strict=False):
        rows.append((at, at + length, data.draw(st.sampled_from([slot, slot, -1]))))
        at += length
    check_update(column_slice(at + 1, DIM, torch.float32, device), rows, accepted, backend, 3)


@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_ragged_prefill(backend: str, device: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 3, 16, 17, 35]), min_size=1, max_size=4), label="lengths")
    slots = data.draw(st.permutations(range(6)), label="slots")
    has_history = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)), label="history")
    rows, at = [], 0
    for length, slot in zip(lengths, slots, strict=False):
        rows.append((at, at + length, data.draw(st.sampled_from([slot, slot, -1]))))
        at += length
    check_prefill(column_slice(at + 1, DIM, torch.float32, device), rows, has_history, backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_tokens(backend: str, device: str) -> None:
    check_prefill(column_slice(3, DIM, torch.float32, device), [], [], backend)
    check_prefill(column_slice(0, DIM, torch.float32, device), [(0, 0, 1)], [True], backend)
    check_update(column_slice(3, DIM, torch.float32, device), [], None, backend, 1)
    check_update(column_slice(0, DIM, torch.float32, device), [(0, 0, 1)], [1], backend, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(DIM, 9)}, "width 9 is outside 2..8"),
        ({"weight": torch.zeros(DIM + 1, 4)}, r"weight has shape \(11, 4\); \(10, 4\) is needed"),
        ({"conv_state": torch.zeros(6, DIM, 2)}, r"conv_state has shape \(6, 10, 2\): width 4 needs at least 3"),
        ({"conv_state": torch.zeros(6, DIM)}, r"conv_state has shape \(6, 10\)"),
        ({"bias": torch.zeros(3)}, r"bias has shape \(3,\)"),
        ({"out": torch.zeros(5, DIM, dtype=torch.float16)}, "out is torch.float16"),
        ({"max_query_len": 3}, r"max_query_len is 3, but conv_state of shape \(6, 10, 4\) takes 0 to 2"),
        ({"num_accepted_tokens": torch.zeros(2, dtype=torch.int32)}, r"num_accepted_tokens has shape \(2,\)"),
        ({"activation": "gelu"}, "activation is 'gelu'"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    good = {
        "x": torch.zeros(5, DIM),
        "weight": torch.zeros(DIM, 4),
        "bias": None,
        "conv_state": torch.zeros(6, DIM, 4),
        "query_start": ints([0], "cpu"),
        "query_end": ints([1], "cpu"),
        "state_slots": ints([1], "cpu"),
        "num_accepted_tokens": None,
        "max_query_len": 1,
        "out": torch.zeros(5, DIM),
    }
    with pytest.raises(ValueError, match=message):
        conv.causal_conv1d_update(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
def test_real_shapes(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.kernels.test_conv.DIM", 8192)
    x = column_slice(1000, 8192, dtype, device)
    check_prefill(x, [(0, 700, 1), (700, 701, 0), (703, 1000, 2)], [True, False, True], None, layout="transposed")
    check_update(x, [(0, 3, 1), (7, 8, 0), (20, 22, 2)], [3, 1, 2], None, 3, layout="transposed")
