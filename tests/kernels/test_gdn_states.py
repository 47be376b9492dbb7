"""Drafts that leave a state a token, in one operation: the float64 formula, and what three operations leave."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn.table import StatesTile

from .common import BACKENDS, DTYPES, assert_repeatable
from .gdn_case import assert_error, limit
from .layer_case import EPS, make_layer
from .slots import STATE_LAYOUTS, ints
from .states_case import StatesCase

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Out of order, whole, short and of one token, an empty one, a skipped one, and tokens 9 and 11 in none.
SPANS = [(3, 6, 2), (0, 2, 3), (2, 3, 1), (1, 1, 2), (6, 9, 0), (10, 11, 3)]
TOKENS = 12


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 3), (3, 3), (4, 8), (8, 16), (16, 32)])
def test_ragged_rows(heads: tuple[int, int], backend: str, device: str) -> None:
    StatesCase(make_layer(TOKENS, device, heads, (8, 8)), SPANS, 3, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", range(1, 9))
def test_any_number_of_tokens_and_accepted_ones(length: int, backend: str, device: str) -> None:
    for accepted in {1, (length + 1) // 2, length}:
        spans = [(0, length, accepted), (length, 2 * length, length + 1 - accepted)]
        StatesCase(make_layer(2 * length, device), spans, length, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    layer = make_layer(TOKENS, device, dtype=torch.bfloat16)
    StatesCase(layer, SPANS, 3, backend, state_dtype=state_dtype, layout=layout).check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 40), (12, 20), (5, 3), (128, 128)])
def test_token_dtypes_and_head_dims(dims: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    layer = make_layer(5, device, dims=dims, dtype=dtype)
    for state_dtype in (torch.float32, torch.bfloat16):
        case = StatesCase(layer, [(3, 5, 1), (0, 2, 2)], 2, backend, state_dtype=state_dtype, tile=StatesTile(32, 4))
        case.check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_convolution_widths(width: int, backend: str, device: str) -> None:
    StatesCase(make_layer(TOKENS, device, width=width), SPANS, 3, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_states_that_go_nowhere(backend: str, device: str) -> None:
    nowhere = [(0, 0), (0, 2), (1, 1), (2, 0)]
    StatesCase(make_layer(TOKENS, device), SPANS, 3, backend, nowhere=nowhere).check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_keys_that_repeat(backend: str, device: str) -> None:
    """What the first token wrote, the second overwrites: the same key, once the window is full of it."""
    layer = make_layer(8, device, (1, 2), (16, 8))
    layer.tokens.mixed_qkv[:, 16:32] = layer.tokens.mixed_qkv[:1, 16:32].clone()
    StatesCase(layer, [(0, 8, 1)], 8, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_as_engines_pad_a_captured_batch(backend: str, device: str) -> None:
    """Rows of slot -1, empty rows behind the last token with slots and without, and tokens behind all rows."""
    StatesCase(make_layer(8, device), [(0, 2, 1), (2, 4, 0), (4, 6, 2), (6, 8, 0)], 2, backend).check()
    StatesCase(make_layer(6, device), [(0, 3, 2), (3, 6, 1), (6, 6, 1), (6, 6, 0)], 3, backend).check()
    StatesCase(make_layer(20, device), [(0, 3, 2)], 3, backend).check()
    StatesCase(make_layer(4, device), [], 3, backend).check()
    StatesCase(make_layer(4, device), [(0, 0, 1), (0, 2, 0)], 3, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_first_tokens_of_a_longer_row(backend: str, device: str) -> None:
    StatesCase(make_layer(8, device), [(4, 8, 1), (0, 3, 2)], 2, backend).check()


@pytest.mark.parametrize("backend", BACKENDS)
@given(data=st.data())
def test_any_batch(backend: str, device: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 5), label="length")
    lengths = data.draw(st.lists(st.integers(0, length), min_size=1, max_size=4), label="lengths")
    spans, at = [], data.draw(st.integers(0, 2), label="padding in front")
    for count in lengths:
        spans.append((at, at + count, data.draw(st.integers(0, length), label="accepted")))
        at += count
    spans = data.draw(st.permutations(spans), label="order")
    nowhere = [(n, token) for n in range(len(spans)) for token in range(length) if data.draw(st.booleans())]
    layer = make_layer(at + 1, device, heads=(1, 1), dims=(4, 4))
    StatesCase(layer, spans, length, backend, nowhere=nowhere).check()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_step_after_step_with_drafts_taken_back(state_dtype: torch.dtype, backend: str, device: str) -> None:
    """Every step has one to four tokens and keeps some; the next begins behind those, with others."""
    steps, most, rows = 6, 4, 2
    length = [[int(torch.randint(1, most + 1, ())) for _ in range(steps)] for _ in range(rows)]
    taken = [[int(torch.randint(1, count + 1, ())) for count in row] for row in length]
    right = make_layer(rows * steps * most, device, (1, 2))
    first = StatesCase(make_layer(2, device), [(0, 1, 1), (1, 2, 1)], most, backend, state_dtype=state_dtype)
    begun = [
        (first.windows[own[0], :, : first.taps].clone(), first.states[own[0]].clone())
        for own in (first.table[n] for n in range(rows))
    ]
    outs: list[list[torch.Tensor]] = [[] for _ in range(rows)]
    done, accepted = [0] * rows, [1] * rows
    for step in range(steps):
        counts = [row[step] for row in length]
        batch = make_layer(sum(counts), device, (1, 2))
        batch.conv_weight, batch.norm_weight = right.conv_weight, right.norm_weight
        batch.tokens.A_log, batch.tokens.dt_bias = right.tokens.A_log, right.tokens.dt_bias
        spans, at = [], 0
        for n, count in enumerate(counts):
            own, kept = n * steps * most + done[n], taken[n][step]
            for mine, theirs in zip(batch.arguments()[:4], right.arguments()[:4], strict=True):
                mine[at : at + kept] = theirs[own : own + kept]
            spans.append((at, at + count, accepted[n]))
            at += count
        first.layer, first.spans = batch, spans
        first.initial = [int(first.table[n, accepted[n] - 1]) for n in range(rows)]
        out = first.verify(first.windows, first.states)
        for n, (start, _, _) in enumerate(spans):
            accepted[n] = taken[n][step]
            outs[n].append(out[start : start + accepted[n]])
            done[n] += accepted[n]
    for n in range(rows):
        own = n * steps * most
        expected, _, states = right.expected(own, own + done[n], *begun[n])
        slack = 1.0 if state_dtype is torch.float32 else 2.0 * steps
        assert_error(torch.cat(outs[n]), expected, slack * limit(state_dtype, right.tokens, backend), f"row {n}")
        last = first.states[first.table[n, accepted[n] - 1]]
        assert_error(last, states[-1], slack * limit(state_dtype, right.tokens, backend), f"state of row {n}")


def test_repeatable(device: str) -> None:
    case = StatesCase(make_layer(TOKENS, device), SPANS, 3, "triton")
    held = case.windows, case.states

    def run() -> tuple[torch.Tensor, ...]:
        windows, states = (tensor.clone() for tensor in held)
        out = case.verify(windows, states)
        return tuple(torch.nan_to_num(tensor) for tensor in (out, windows, states))

    assert_repeatable(run)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv_slots": [0]}, "state_slots"),
        ({"initial_slots": [0, 1, 2]}, "initial_slots"),
        ({"num_accepted_tokens": [1]}, "num_accepted_tokens"),
        ({"max_query_len": 4}, "max_query_len is 4, but conv_state"),
        ({"output_slots": [[0], [1]]}, "max_query_len is 2, but output_slots"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Any], said: str, device: str) -> None:
    layer = make_layer(4, device)
    arguments: dict[str, Any] = {
        "conv_slots": [0, 2],
        "initial_slots": [0, 3],
        "num_accepted_tokens": [1, 2],
        "output_slots": [[0, 1], [2, 3]],
    }
    given_ = {"max_query_len": 2} | {
        name: value if isinstance(value, int) else torch.tensor(value, dtype=torch.int32, device=device)
        for name, value in (arguments | change).items()
    }
    states = (layer.windows(4, 4, torch.float32, "contiguous"), layer.tokens.state(4))
    shared = {"num_k_heads": 1, "norm_eps": EPS, "out": layer.tokens.out()}
    rows = {"query_start": ints([0, 2], device), "query_end": ints([2, 4], device)}
    with pytest.raises(ValueError, match=said):
        gdn.gdn_verify_states(*layer.arguments(), *states, **shared, **rows, **given_)
