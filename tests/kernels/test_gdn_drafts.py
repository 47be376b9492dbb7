"""Drafts verified without moving a state, and the commit of what was accepted, against the float64 formula."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gdn
from tests.helpers import nan_like

from .common import BACKENDS, DTYPES, assert_repeatable
from .draft_case import LENGTH, SLOTS, Case
from .gdn_case import assert_error, limit
from .layer_case import EPS, make_layer
from .slots import STATE_LAYOUTS, bits, ints, ranges

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Out of order, a short row, an empty one, a skipped one, and tokens 9 and 11 in none.
ROWS = [(3, 6, 2), (0, 2, 5), (1, 1, 0), (6, 9, -1), (10, 11, 1)]
TOKENS = 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4), (4, 8), (1, 3)])
def test_ragged_rows_and_snapshots(heads: tuple[int, int], backend: str, device: str) -> None:
    layers = [make_layer(TOKENS, device, heads, (8, 8)) for _ in range(2)]
    for layer in layers[1:]:
        layer.tokens.A_log = torch.randn_like(layer.tokens.A_log)
    # An accepted token of a skipped row moves nothing, and neither does an accepted none.
    Case(layers, ROWS, backend).check([2, -1, -1, 1, 0], [(7, 1), (8, 0), (9, 0), (10, 0), (11, 0)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("accepted", range(5))
def test_any_number_of_accepted_tokens(accepted: int, backend: str, device: str) -> None:
    case = Case([make_layer(8, device)], [(0, 4, 3), (4, 8, 1)], backend, length=4)
    case.check([accepted - 1, 3 - accepted])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    layers = [make_layer(TOKENS, device, dtype=torch.bfloat16) for _ in range(2)]
    case = Case(layers, ROWS, backend, state_dtype=state_dtype, layout=layout)
    case.check([1, 1, -1, -1, 0], [(7, 0), (-1, 1), (9, -1), (10, 0), (11, -1)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 40), (12, 20), (5, 3)])
def test_token_dtypes_and_head_dims(dims: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    case = Case([make_layer(5, device, dims=dims, dtype=dtype)], [(3, 5, 3), (0, 2, 1)], backend, length=2)
    case.check([1, 0], [(2, 0), (4, 0)])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_convolution_widths(width: int, backend: str, device: str) -> None:
    Case([make_layer(TOKENS, device, width=width)], ROWS, backend).check(
        [2, 0, -1, 0, 0], [(7 + n, 0) for n in range(5)]
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_as_engines_pad_a_captured_batch(backend: str, device: str) -> None:
    """Rows of slot -1, empty rows behind the last token, and rows for which there is no record."""
    Case([make_layer(8, device)], [(0, 2, 2), (2, 4, -1), (4, 6, 1), (6, 8, -1)], backend, length=2).check([1, 1, 0, 0])
    Case([make_layer(6, device)], [(0, 2, 2), (2, 4, 1), (4, 6, -1)], backend, length=2, room=2).check([1, 0, 1])
    Case([make_layer(6, device)], [(0, 2, 2), (2, 4, 1), (4, 6, 3)], backend, length=2, room=1).check([1, 0, 1])
    Case([make_layer(9, device)], [(0, 3, 2), (3, 3, 0), (3, 3, 1)], backend).check([2, -1, -1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_first_tokens_of_a_longer_row(backend: str, device: str) -> None:
    Case([make_layer(8, device)], [(4, 8, 1), (0, 3, 3)], backend, length=2).check([1, 1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: str) -> None:
    for rows in ([], [(0, 0, 1), (0, 2, -1)]):
        Case([make_layer(2, device)], rows, backend).check([1 if end > start else -1 for start, end, _ in rows])
    Case([make_layer(0, device)], [(0, 0, 1)], backend).check([-1])


@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.integers(0, LENGTH), min_size=1, max_size=4), label="lengths")
    slots = data.draw(st.permutations(range(SLOTS)), label="slots")
    order = data.draw(st.permutations(range(len(lengths))), label="order")
    rows, last, snapshots, at = [], [], [], data.draw(st.integers(0, 2), label="padding in front")
    for n, length in enumerate(lengths):
        rows.append((at, at + length, data.draw(st.sampled_from([slots[2 * n], -1]))))
        last.append(data.draw(st.integers(-1, max(length - 1, -1))))
        snapshots.append((data.draw(st.sampled_from([slots[2 * n + 1], -1])), data.draw(st.integers(-1, LENGTH - 1))))
        at += length
    shuffled = [[values[n] for n in order] for values in (rows, last, snapshots)]
    case = Case([make_layer(at + 1, device, heads=(1, 1), dims=(4, 4))], shuffled[0], backend)
    case.check(shuffled[1], data.draw(st.sampled_from([shuffled[2], None]), label="snapshots"))


@pytest.mark.parametrize("heads", [(1, 2), (2, 2)])
def test_tokens_at_once_are_tokens_one_by_one(heads: tuple[int, int], device: str) -> None:
    """Float32 states and windows: nothing depends on how many tokens a verification had, or how many were kept.

    To the bit in the interpreter; a compiler contracts the products in an unrolled loop and in what is left of it
    differently.
    """

    def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
        if device == "cpu":
            assert torch.equal(bits(mine.contiguous()), bits(theirs.contiguous()))
        else:
            torch.testing.assert_close(mine, theirs, rtol=2e-6, atol=2e-6, equal_nan=True)

    layer, rows = make_layer(6, device, heads), [(0, 6, 1)]
    once = Case([layer], rows, "triton", length=6)
    stepwise = Case([layer], rows, "triton", length=6)
    for mine, theirs in ((stepwise.windows, once.windows), (stepwise.states, once.states)):
        mine.copy_(theirs)
    whole = once.verify()[0]
    once.commit([5])
    for start, stop, kept in ((0, 3, 2), (2, 6, 1), (3, 6, 3)):
        stepwise.rows = [(start, stop, 1)]
        out = stepwise.verify()[0]
        assert_same(out[start:stop], whole[start:stop])
        stepwise.commit([kept - 1])
    for mine, theirs in ((stepwise.windows, once.windows), (stepwise.states, once.states)):
        assert_same(mine, theirs)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_commit_is_sequential_decode(backend: str, device: str) -> None:
    """The same tokens decoded one by one; in float32, where a decode does not round in between."""
    case = Case([make_layer(8, device, (2, 4))], [(0, 4, 3), (4, 8, 1)], backend, length=4)
    (layer,), (windows, states) = case.layers, (part[0].clone() for part in case.before)
    case.verify()
    case.commit([2, 3])
    for rows in ([(0, 1, 3), (4, 5, 1)], [(1, 2, 3), (5, 6, 1)], [(2, 3, 3), (6, 7, 1)], [(7, 8, 1)]):
        gdn.gdn_decode_fused(
            *layer.arguments(),
            windows,
            states,
            num_k_heads=2,
            norm_eps=EPS,
            **ranges(rows, device),
            state_slots=ints([slot for _, _, slot in rows], device),
            out=layer.tokens.out(),
            backend=backend,
        )
    for slot in (1, 3):
        assert torch.equal(windows[slot], case.windows[0, slot])
        assert_error(states[slot], case.states[0, slot].cpu().double(), 2e-6, f"slot {slot}")


def arguments(device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Good arguments of a verification and of a commit, by name."""
    case = Case([make_layer(4, device)], [(0, 2, 1), (2, 4, 0)], None, length=2)
    names = ("mixed_qkv", "z", "a", "b", "conv_weight", "A_log", "dt_bias", "norm_weight")
    verify = dict(zip(names, case.layers[0].arguments(), strict=True)) | {
        "conv_state": case.windows[0],
        "ssm_state": case.states[0],
        "record": case.records.layer(0),
        "num_k_heads": 1,
        "norm_eps": EPS,
        **ranges(case.rows, device),
        "max_query_len": 2,
        "state_slots": ints([1, 0], device),
        "out": case.layers[0].tokens.out(),
    }
    states = {"conv_state": case.windows, "ssm_state": case.states, "records": case.records}
    return verify, states | {"state_slots": ints([1, 0], device), "last_tokens": ints([1, 0], device)}


def other_records(**sizes: Any) -> gdn.DraftRecords:
    given: dict[str, Any] = {"num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
    return gdn.DraftRecords.allocate(1, 2, 2, **(given | sizes), input_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_query_len": 3}, "max_query_len is 3, but record has room for 2 tokens a row"),
        ({"record": other_records()}, r"record.inputs has shape \(1, 2, 2, 48\); \[rows, tokens a row, conv_dim\]"),
        ({"record": other_records(head_v_dim=4).layer(0)}, r"record.inputs has shape \(2, 2, 40\); \(2, 2, 48\)"),
        ({"state_slots": torch.zeros(1).int()}, r"state_slots has shape \(1,\); \(2,\) is needed"),
        ({"conv_state": torch.zeros(3, 48, 2)}, r"conv_state has shape \(3, 48, 2\): width 4 needs at least 3 columns"),
    ],
)
def test_bad_arguments_of_a_verification_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn.gdn_verify_fused(**(arguments("cpu")[0] | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_tokens": torch.zeros(2)}, "last_tokens is torch.float32"),
        ({"snapshot_slots": torch.zeros(2).int()}, "snapshot_tokens is None, but snapshot_slots, snapshot_tokens come"),
        ({"records": other_records(num_v_heads=4)}, r"record.inputs has shape \(1, 2, 2, 64\); \(1, 2, 2, 48\)"),
        ({"records": other_records(num_k_heads=3)}, "3 key heads, but the 2 value heads"),
        ({"conv_state": torch.zeros(1, 3, 40, 3)}, r"conv_state has shape \(1, 3, 40, 3\); \(1, 3, 48, 3\)"),
        ({"state_slots": torch.zeros(2, 1).int()}, r"state_slots has shape \(2, 1\); \[rows\]"),
    ],
)
def test_bad_arguments_of_a_commit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn.gdn_commit(**(arguments("cpu")[1] | change))


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(16, 32), (8, 16), (4, 8)])
@pytest.mark.parametrize("length", [2, 4, 8])
def test_real_shapes(length: int, heads: tuple[int, int], state_dtype: torch.dtype, device: str) -> None:
    layers = [make_layer(6 * length, device, heads, (128, 128), torch.bfloat16) for _ in range(2)]
    rows = [(n * length, n * length + length, 5 - n) for n in range(6)]
    case = Case(layers, rows, None, length=length, state_dtype=state_dtype, layout="pages")
    case.check([length - 1, 0, 1, length - 1, -1, 0], [(6 + n, n % length) for n in range(6)])


@pytest.mark.gpu
def test_real_shapes_at_once_are_one_by_one_to_the_bit(device: str) -> None:
    layer = make_layer(4, device, (16, 32), (128, 128))
    once, stepwise = (Case([layer], [(0, 4, 1)], None, length=4) for _ in range(2))
    for mine, theirs in ((stepwise.windows, once.windows), (stepwise.states, once.states)):
        mine.copy_(theirs)
    once.verify()
    once.commit([3])
    for start in range(4):
        stepwise.rows = [(start, 4, 1)]
        stepwise.verify()
        stepwise.commit([0])
    assert torch.equal(bits(once.states.contiguous()), bits(stepwise.states.contiguous()))


@pytest.mark.gpu
def test_a_captured_verification_follows_new_rows(device: str) -> None:
    """Captured with padding only and replayed with rows: nothing about the rows is baked into the graph."""
    case = Case([make_layer(6, device, (2, 4), (128, 128))], [(0, 3, 2), (3, 6, 1)], None)
    layer = case.layers[0]
    rows = {name: torch.zeros(2, dtype=torch.int32, device=device) for name in ("query_start", "query_end")}
    slots, out = ints([-1, -1], device), nan_like(6, 4, 128, device=device)

    def run() -> None:
        states = (case.windows[0], case.states[0], case.records.layer(0))
        options = {"num_k_heads": 2, "norm_eps": EPS, "max_query_len": 3, "state_slots": slots, "out": out}
        gdn.gdn_verify_fused(*layer.arguments(), *states, **rows, **options)

    run()  # compiles before the capture
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    for name, values in ranges(case.rows, device).items():
        rows[name].copy_(values)
    slots.copy_(ints([2, 1], device))
    graph.replay()
    for _, start, end, slot in case.running:
        o, _, _ = layer.expected(start, end, case.before[0][0][slot], case.before[1][0][slot])
        assert_error(out[start:end], o, limit(out.dtype, layer.tokens, None), f"row at {start}")


@pytest.mark.parametrize("length", [2, 4, 8])
def test_the_same_every_time(length: int, device: str) -> None:
    """Verified and committed from the same states, on a GPU a thousand times in the published shape."""
    heads, dims = ((16, 32), (128, 128)) if device == "cuda" else ((1, 2), (16, 8))
    layer = make_layer(6 * length, device, heads, dims, torch.bfloat16 if device == "cuda" else torch.float32)
    case = Case([layer], [(n * length, n * length + length, n) for n in range(6)], "triton", length=length)

    def step() -> list[torch.Tensor]:
        for states, before in zip((case.windows, case.states), case.before, strict=True):
            states.copy_(before)
        outs = case.verify()
        case.commit([length - 1, 0, 1, length - 1, -1, 0])
        return [*outs, *(bits(states.contiguous()) for states in (case.windows, case.states))]

    assert_repeatable(step)
