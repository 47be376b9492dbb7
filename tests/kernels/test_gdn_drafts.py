"""Drafts verified without moving a state, and the commit of what was accepted, against the float64 formula."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn.table import FORMS, STEPS
from tests.helpers import nan_like

from .common import DTYPES, assert_repeatable
from .draft_case import LENGTH, SLOTS, WAYS, Case
from .gdn_case import assert_error, limit
from .layer_case import EPS, Layer, make_layer
from .slots import STATE_LAYOUTS, bits, ints, ranges

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Out of order, a short row, an empty one, a skipped one, and tokens 9 and 11 in none.
ROWS = [(3, 6, 2), (0, 2, 5), (1, 1, 0), (6, 9, -1), (10, 11, 1)]
TOKENS = 12


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4), (4, 8), (1, 3)])
def test_ragged_rows_and_snapshots(heads: tuple[int, int], way: str, device: str) -> None:
    layers = [make_layer(TOKENS, device, heads, (8, 8)) for _ in range(2)]
    for layer in layers[1:]:
        layer.tokens.A_log = torch.randn_like(layer.tokens.A_log)
    # An accepted token of a skipped row moves nothing, and neither does an accepted none.
    Case(layers, ROWS, way).check([2, -1, -1, 1, 0], [(7, 1), (8, 0), (9, 0), (10, 0), (11, 0)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("accepted", range(5))
def test_any_number_of_accepted_tokens(accepted: int, way: str, device: str) -> None:
    case = Case([make_layer(8, device)], [(0, 4, 3), (4, 8, 1)], way, length=4)
    case.check([accepted - 1, 3 - accepted])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, way: str, device: str) -> None:
    layers = [make_layer(TOKENS, device, dtype=torch.bfloat16) for _ in range(2)]
    case = Case(layers, ROWS, way, state_dtype=state_dtype, layout=layout)
    case.check([1, 1, -1, -1, 0], [(7, 0), (-1, 1), (9, -1), (10, 0), (11, -1)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 40), (12, 20), (5, 3)])
def test_token_dtypes_and_head_dims(dims: tuple[int, int], dtype: torch.dtype, way: str, device: str) -> None:
    case = Case([make_layer(5, device, dims=dims, dtype=dtype)], [(3, 5, 3), (0, 2, 1)], way, length=2)
    case.check([1, 0], [(2, 0), (4, 0)])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_convolution_widths(width: int, way: str, device: str) -> None:
    Case([make_layer(TOKENS, device, width=width)], ROWS, way).check([2, 0, -1, 0, 0], [(7 + n, 0) for n in range(5)])


@pytest.mark.parametrize("way", WAYS)
def test_padding_as_engines_pad_a_captured_batch(way: str, device: str) -> None:
    """Rows of slot -1, empty rows behind the last token, and rows for which there is no record."""
    Case([make_layer(8, device)], [(0, 2, 2), (2, 4, -1), (4, 6, 1), (6, 8, -1)], way, length=2).check([1, 1, 0, 0])
    Case([make_layer(6, device)], [(0, 2, 2), (2, 4, 1), (4, 6, -1)], way, length=2, room=2).check([1, 0, 1])
    Case([make_layer(6, device)], [(0, 2, 2), (2, 4, 1), (4, 6, 3)], way, length=2, room=1).check([1, 0, 1])
    Case([make_layer(9, device)], [(0, 3, 2), (3, 3, 0), (3, 3, 1)], way).check([2, -1, -1])


@pytest.mark.parametrize("way", WAYS)
def test_only_the_first_tokens_of_a_longer_row(way: str, device: str) -> None:
    Case([make_layer(8, device)], [(4, 8, 1), (0, 3, 3)], way, length=2).check([1, 1])


@pytest.mark.parametrize("way", WAYS)
def test_no_rows(way: str, device: str) -> None:
    for rows in ([], [(0, 0, 1), (0, 2, -1)]):
        Case([make_layer(2, device)], rows, way).check([1 if end > start else -1 for start, end, _ in rows])
    Case([make_layer(0, device)], [(0, 0, 1)], way).check([-1])


@given(data=st.data())
@pytest.mark.parametrize("way", WAYS)
def test_any_batch(way: str, device: str, data: st.DataObject) -> None:
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
    case = Case([make_layer(at + 1, device, heads=(1, 1), dims=(4, 4))], shuffled[0], way)
    case.check(shuffled[1], data.draw(st.sampled_from([shuffled[2], None]), label="snapshots"))


def twins(layer: Layer, rows: Sequence[tuple[int, int, int]], form: str, length: int) -> tuple[Case, Case]:
    """Two cases that begin with the same states."""
    one, other = (Case([layer], rows, form, length=length, tile_rows=128) for _ in range(2))
    for mine, theirs in ((other.windows, one.windows), (other.states, one.states)):
        mine.copy_(theirs)
    return one, other


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("heads", [(1, 2), (2, 2)])
def test_tokens_at_once_are_tokens_one_by_one(heads: tuple[int, int], form: str, device: str) -> None:
    """Float32 states and windows: nothing depends on how many tokens a verification had, or how many were kept.

    To the bit from token to token in the interpreter; a compiler contracts the products in an unrolled loop and in what
    is left of it differently. All tokens at once have other sums than one by one.
    """

    def assert_same(mine: torch.Tensor, theirs: torch.Tensor) -> None:
        if device == "cpu" and form == STEPS:
            assert torch.equal(bits(mine.contiguous()), bits(theirs.contiguous()))
        else:
            error = 2e-6 if form == STEPS else 1e-5
            torch.testing.assert_close(mine, theirs, rtol=error, atol=error, equal_nan=True)

    once, stepwise = twins(make_layer(6, device, heads), [(0, 6, 1)], form, 6)
    whole = once.verify()[0]
    once.commit([5])
    for start, stop, kept in ((0, 3, 2), (2, 6, 1), (3, 6, 3)):
        stepwise.rows = [(start, stop, 1)]
        out = stepwise.verify()[0]
        assert_same(out[start:stop], whole[start:stop])
        stepwise.commit([kept - 1])
    for mine, theirs in ((stepwise.windows, once.windows), (stepwise.states, once.states)):
        assert_same(mine, theirs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [3, 6])
def test_a_token_does_not_know_what_comes_behind_it(length: int, form: str, device: str) -> None:
    """To the bit, in outputs and records: what is kept does not depend on drafts that are not, or on their number."""
    layer = make_layer(length, device, (1, 2))
    long, short = twins(layer, [(0, length, 1)], form, length)
    outs = [long.verify()[0][:2].clone()]
    short.rows = [(0, 2, 1)]
    layer.tokens.mixed_qkv[2:] = float("nan")
    outs.append(short.verify()[0][:2])
    assert torch.equal(*(bits(out.contiguous()) for out in outs))
    for one, other in zip(long.records.tensors(), short.records.tensors(), strict=True):
        assert torch.equal(bits(one[:, :, :2].contiguous()), bits(other[:, :, :2].contiguous()))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_many_steps_with_drafts_taken_back_stay_near_the_formula(
    state_dtype: torch.dtype, way: str, device: str
) -> None:
    """Every step verifies four tokens and keeps none to four of them; the next begins behind those."""
    tokens, length, slot = 24, 4, 1
    layer = make_layer(tokens, device)
    case = Case([layer], [(0, tokens, slot)], way, length=tokens, state_dtype=state_dtype)
    case.length = length
    (window,), (state,) = (part[:, slot].double() for part in case.before)
    outputs, _, states = layer.expected(0, tokens, window, state)
    start, rounded = 0, 0
    for kept in (4, 0, 1, 3, 2, 0, 4, 4):
        case.rows = [(start, start + length, slot)]
        out = case.verify()[0][start : start + length]
        # A state of bfloat16 is rounded once a commit, and cut off where the interpreter runs.
        allowed = 1e-5 + (rounded * 8e-3 if state_dtype is torch.bfloat16 else 0.0)
        assert_error(out, outputs[start : start + length], allowed, f"tokens from {start} on")
        case.commit([kept - 1])
        start, rounded = start + kept, rounded + (kept > 0)
    assert_error(case.states[0, slot], states[start - 1], allowed + 8e-3 * (state_dtype is torch.bfloat16), "the state")


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [1, 9])
def test_lengths_that_fill_no_instruction_and_more_than_one(length: int, form: str, device: str) -> None:
    rows = [(0, length, 3), (length, 2 * length, 1)]
    Case([make_layer(2 * length, device)], rows, form, length=length).check([length - 1, length // 2])


@pytest.mark.parametrize("way", WAYS)
def test_a_commit_is_sequential_decode(way: str, device: str) -> None:
    """The same tokens decoded one by one; in float32, where a decode does not round in between."""
    case = Case([make_layer(8, device, (2, 4))], [(0, 4, 3), (4, 8, 1)], way, length=4)
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
            backend=case.backend,
        )
    for slot in (1, 3):
        assert torch.equal(windows[slot], case.windows[0, slot])
        assert_error(states[slot], case.states[0, slot].cpu().double(), 2e-6, f"slot {slot}")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("length", "heads", "state_dtype"),
    [
        *product((2, 3, 8), ((16, 32), (8, 16), (4, 8)), (torch.float32, torch.bfloat16)),
        *product((1, 4), ((4, 8),), DTYPES),
    ],
)
def test_real_shapes(length: int, heads: tuple[int, int], state_dtype: torch.dtype, form: str, device: str) -> None:
    layers = [make_layer(6 * length, device, heads, (128, 128), torch.bfloat16) for _ in range(2)]
    rows = [(n * length, n * length + length, 5 - n) for n in range(6)]
    case = Case(layers, rows, form, length=length, state_dtype=state_dtype, layout="pages", tile_rows=128)
    case.check([length - 1, 0, min(1, length - 1), length - 1, -1, 0], [(6 + n, n % length) for n in range(6)])


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_real_shapes_at_once_are_one_by_one(form: str, device: str) -> None:
    """To the bit from token to token; all at once sum in another order."""
    once, stepwise = twins(make_layer(4, device, (16, 32), (128, 128)), [(0, 4, 1)], form, 4)
    once.verify()
    once.commit([3])
    for start in range(4):
        stepwise.rows = [(start, 4, 1)]
        stepwise.verify()
        stepwise.commit([0])
    if form == STEPS:
        assert torch.equal(bits(once.states.contiguous()), bits(stepwise.states.contiguous()))
    assert_error(once.states[0, 1], stepwise.states[0, 1].cpu().double(), 1e-5, "the state")


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


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("length", [2, 4, 8])
def test_the_same_every_time(length: int, form: str, device: str) -> None:
    """Verified and committed from the same states, on a GPU a thousand times in the published shape."""
    heads, dims = ((16, 32), (128, 128)) if device == "cuda" else ((1, 2), (16, 8))
    layer = make_layer(6 * length, device, heads, dims, torch.bfloat16 if device == "cuda" else torch.float32)
    case = Case([layer], [(n * length, n * length + length, n) for n in range(6)], form, length=length, tile_rows=128)

    def step() -> list[torch.Tensor]:
        for states, before in zip((case.windows, case.states), case.before, strict=True):
            states.copy_(before)
        outs = case.verify()
        case.commit([length - 1, 0, 1, length - 1, -1, 0])
        return [*outs, *(bits(states.contiguous()) for states in (case.windows, case.states))]

    assert_repeatable(step)
