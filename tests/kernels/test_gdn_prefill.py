"""Chunked prefill over slot-addressed state: every row, slot and token that matters, against the float64 formula."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.table import OWN, OwnPrefill, PrefillWay

from .common import BACKENDS, DTYPES, assert_repeatable
from .gdn_case import assert_error, check_prefill, formula, limit, make_tokens, run_prefill
from .slots import STATE_LAYOUTS, clone_layout, fill_slots, ints

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Rows out of order, with an empty one, a skipped one (negative slot), and tokens 70..74 in no row.
RAGGED = [(5, 70, 3), (5, 5, 0), (74, 79, 1), (0, 5, -1), (79, 80, 4)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_one_row(length: int, has_state: bool, backend: str, device: str) -> None:
    check_prefill(make_tokens(length, device), [(0, length, 2)], [has_state], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4)])
def test_ragged_rows(heads: tuple[int, int], backend: str, device: str) -> None:
    check_prefill(make_tokens(83, device, heads), RAGGED, [True, True, False, True, True], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    tokens = make_tokens(70, device)
    check_prefill(tokens, [(2, 67, 3), (68, 70, 0)], [True, False], backend, state_dtype, layout)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_token_dtypes(dtype: torch.dtype, backend: str, device: str) -> None:
    tokens = make_tokens(70, device, dtype=dtype)
    check_prefill(tokens, [(0, 66, 1), (66, 70, 0)], [True, False], backend, state_dtype=dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dims", [(16, 16), (12, 20), (24, 40), (40, 5)])
def test_head_dims(dims: tuple[int, int], backend: str, device: str) -> None:
    check_prefill(make_tokens(66, device, dims=dims), [(0, 66, 1)], [True], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_tensor_parallel_shard_is_a_slice_of_the_whole(ranks: int, backend: str, device: str) -> None:
    if backend == "triton" and device == "cpu" and ranks < 4:
        pytest.skip("the interpreter takes a program a head: small shards only")
    whole = make_tokens(9, device, heads=(16, 32), dims=(8, 4))
    shard = make_tokens(9, device, heads=(16 // ranks, 32 // ranks), dims=(8, 4))
    rank = ranks - 1
    q, k, v = whole.mixed_qkv.split([128, 128, 128], dim=1)
    shard.mixed_qkv = torch.cat([part.chunk(ranks, dim=1)[rank] for part in (q, k, v)], dim=1)
    shard.a, shard.b = (part.chunk(ranks, dim=1)[rank] for part in (whole.a, whole.b))
    shard.A_log, shard.dt_bias = (part.chunk(ranks)[rank] for part in (whole.A_log, whole.dt_bias))
    out = run_prefill(shard, shard.state(2), [(0, 9, 1)], [False], backend)
    expected, _ = formula(whole, 0, 9, None)
    assert_error(out, expected.chunk(ranks, dim=1)[rank], limit(out.dtype, shard, backend, True), f"{ranks} ranks")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("cuts", [(0, 64, 65, 100), (0, 1, 2, 100), (0, 37, 100)])
def test_in_pieces_is_at_once(cuts: tuple[int, ...], backend: str, device: str) -> None:
    tokens, slot = make_tokens(100, device), 1
    state = tokens.state(3)
    expected, states = formula(tokens, 0, 100, None)
    for start, end in pairwise(cuts):
        out = run_prefill(tokens, state, [(start, end, slot)], [start > 0], backend)
        assert_error(out[start:end], expected[start:end], limit(out.dtype, tokens, backend, True), f"{start}..{end}")
    assert_error(state[slot], states[-1], limit(state.dtype, tokens, backend, True), "final state")


@pytest.mark.parametrize("backend", BACKENDS)
def test_repeated_keys_that_are_never_forgotten(backend: str, device: str) -> None:
    """Powers of the chunk's triangular system reach 1e18 here: an inverse built from them alone would be noise."""
    tokens = make_tokens(64, device)
    tokens.mixed_qkv[:, :32] = tokens.mixed_qkv[:1, :32]
    tokens.a.fill_(-30.0)
    tokens.b.fill_(30.0)
    check_prefill(tokens, [(0, 64, 1)], [True], backend)


@pytest.mark.parametrize("alike", [0.0, 0.1, 1.0], ids=["repeated keys", "keys much alike", "keys unlike"])
@pytest.mark.parametrize(
    ("own", "dims", "dtype"),
    [
        (OwnPrefill("blocks"), (16, 8), torch.float32),
        (OwnPrefill("merging", 4, 168, 3), (64, 64), torch.bfloat16),
    ],
    ids=["blocks", "merging"],
)
def test_the_other_inverses(
    own: OwnPrefill, dims: tuple[int, int], dtype: torch.dtype, alike: float, device: str
) -> None:
    """The other ways to invert the chunk's system, with keys that are hard on it."""
    way = PrefillWay(OWN, own)
    tokens = make_tokens(130, device, dims=dims, dtype=dtype)
    keys = tokens.mixed_qkv[:, : 2 * dims[0]]
    keys.copy_(keys[:1] + alike * keys)
    tokens.a.fill_(-30.0)
    tokens.b.fill_(5.0)
    # Products of bfloat16 leave 0.023 of repeated keys, and left 0.057 while W's factors were rounded once.
    slack = 2.0 if device == "cuda" and dtype is torch.bfloat16 else 1.0
    with config.forced(config.only(config.table_of(torch.device(device)), way)):
        check_prefill(tokens, [(0, 130, 1)], [True], "triton", slack=slack)


@pytest.mark.parametrize("backend", BACKENDS)
def test_strong_decay_does_not_overflow(backend: str, device: str) -> None:
    tokens = make_tokens(70, device)
    tokens.A_log.fill_(5.0)
    tokens.a.fill_(8.0)  # g is about -1300 a token: exp(-G) would be infinite
    check_prefill(tokens, [(0, 70, 1)], [True], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_zero_keys_and_queries(backend: str, device: str) -> None:
    tokens = make_tokens(20, device)
    tokens.mixed_qkv[3:9, :32] = 0.0
    check_prefill(tokens, [(0, 20, 1)], [True], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows_and_no_tokens(backend: str, device: str) -> None:
    check_prefill(make_tokens(4, device), [], [], backend)
    check_prefill(make_tokens(4, device), [(0, 0, 1), (4, 4, 2), (0, 4, -1)], [True, False, True], backend)
    check_prefill(make_tokens(0, device), [(0, 0, 1)], [True], backend)


@given(data=st.data())
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_ragged_batch(backend: str, device: str, data: st.DataObject) -> None:
    lengths = data.draw(st.lists(st.sampled_from([0, 1, 2, 5, 33, 64, 65]), min_size=1, max_size=4), label="lengths")
    gaps = data.draw(st.lists(st.integers(0, 2), min_size=len(lengths), max_size=len(lengths)), label="gaps")
    slots = data.draw(st.permutations(range(6)), label="slots")
    skipped = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)), label="skipped")
    has_state = data.draw(st.lists(st.booleans(), min_size=len(lengths), max_size=len(lengths)), label="has_state")
    rows, at = [], 0
    for length, gap, slot, skip in zip(lengths, gaps, slots, skipped, strict=False):
        at += gap
        rows.append((at, at + length, -1 if skip else slot))
        at += length
    order = data.draw(st.permutations(range(len(rows))), label="order")
    tokens = make_tokens(at + 1, device, heads=(1, 1))
    check_prefill(tokens, [rows[i] for i in order], [has_state[i] for i in order], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_slots_of_64_bits_and_offsets_beyond_32(backend: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slots 2**30 elements apart: a slot's offset does not fit 32 bits. Only the pages in use take memory."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tokens = make_tokens(3, device, heads=(1, 1), dims=(16, 8))
    storage = torch.empty(3 * 2**30 + 128, dtype=torch.float16, device=device)
    state = storage.as_strided((4, 1, 8, 16), (2**30, 128, 16, 1))
    fill_slots(state, [3])
    start = state[3].clone()
    out = tokens.out()
    gdn.gdn_prefill(
        *tokens.arguments(),
        state,
        num_k_heads=1,
        query_start=ints([0], device, torch.int64),
        query_end=ints([3], device, torch.int64),
        max_query_len=3,
        state_slots=ints([3], device, torch.int64),
        has_initial_state=torch.tensor([True], device=device),
        out=out,
        backend=backend,
    )
    o, states = formula(tokens, 0, 3, start)
    assert_error(out, o, limit(out.dtype, tokens, backend, True), "out")
    assert_error(state[3], states[-1], limit(torch.float16, tokens, backend, True), "state")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_k_heads": 3}, "num_k_heads is 3"),
        ({"a": torch.zeros(4, 3)}, r"a has shape \(4, 3\); \(4, 2\) is needed"),
        ({"mixed_qkv": torch.zeros(4, 47)}, r"mixed_qkv has shape \(4, 47\).*need 48 columns"),
        ({"ssm_state": torch.zeros(6, 2, 8)}, r"ssm_state has shape \(6, 2, 8\)"),
        ({"ssm_state": torch.zeros(6, 2, 8, 16, dtype=torch.int32)}, "ssm_state is torch.int32"),
        ({"state_slots": torch.zeros(1)}, "state_slots is torch.float32"),
        ({"query_end": torch.zeros(2, dtype=torch.int32)}, r"query_end has shape \(2,\); \(1,\) is needed"),
        ({"has_initial_state": torch.zeros(1, dtype=torch.int32)}, "has_initial_state is torch.int32"),
        ({"out": torch.zeros(4, 2, 9)}, r"out has shape \(4, 2, 9\)"),
        ({"max_query_len": -1}, "max_query_len is -1"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, object], message: str) -> None:
    tokens = make_tokens(4, "cpu")
    good = {
        "mixed_qkv": tokens.mixed_qkv,
        "a": tokens.a,
        "b": tokens.b,
        "A_log": tokens.A_log,
        "dt_bias": tokens.dt_bias,
        "ssm_state": tokens.state(6),
        "num_k_heads": 1,
        "query_start": ints([0], "cpu"),
        "query_end": ints([4], "cpu"),
        "max_query_len": 4,
        "state_slots": ints([1], "cpu"),
        "has_initial_state": torch.tensor([False]),
        "out": tokens.out(),
    }
    with pytest.raises(ValueError, match=message):
        gdn.gdn_prefill(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [[(0, 1000, 1)], [(0, 513, 1), (513, 514, 2), (600, 964, 0), (514, 600, 4)]])
def test_real_shapes(rows: list[tuple[int, int, int]], dtype: torch.dtype, device: str) -> None:
    tokens = make_tokens(1000, device, heads=(16, 32), dims=(128, 128), dtype=dtype)
    check_prefill(tokens, rows, [i % 2 == 1 for i in range(len(rows))], None)


@pytest.mark.gpu
def test_real_shapes_with_repeated_keys(device: str) -> None:
    tokens = make_tokens(300, device, heads=(16, 32), dims=(128, 128), dtype=torch.bfloat16)
    tokens.mixed_qkv[:, :4096] = tokens.mixed_qkv[:1, :4096]
    tokens.a.fill_(-30.0)
    tokens.b.fill_(30.0)
    check_prefill(tokens, [(0, 300, 1)], [True], None)


def test_the_same_every_time(device: str) -> None:
    """Ragged rows from the same states, on a GPU a thousand times in the published shape."""
    heads, dims = ((16, 32), (128, 128)) if device == "cuda" else ((1, 2), (16, 8))
    tokens = make_tokens(150, device, heads, dims, torch.bfloat16 if device == "cuda" else torch.float32)
    state = tokens.state(4)
    fill_slots(state, range(4), 0.3)

    def prefill() -> tuple[torch.Tensor, torch.Tensor]:
        own = clone_layout(state)
        return run_prefill(tokens, own, [(0, 70, 3), (70, 71, 1), (71, 150, 0)], [True, True, False], "triton"), own

    assert_repeatable(prefill)
