"""Prefill by an engine's function: a stand-in with its calling convention serves like our own kernels, or not."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3next_plugin.kernels import dispatch, gdn
from qwen3next_plugin.kernels.gdn import PackedRows, peers
from qwen3next_plugin.kernels.gdn.choices import prefill_choices
from qwen3next_plugin.kernels.gdn.peer_flashinfer import flashinfer_peer
from qwen3next_plugin.kernels.gdn.peers import HeadShape, PeerCall
from qwen3next_plugin.kernels.gpus import NO_GPU
from tests.helpers import nan_like

from .gdn_case import Tokens, assert_error, formula, limit, make_tokens
from .peer_case import DIM, FakeFlashInfer, empty_registry, small
from .slots import (
    STATE_LAYOUTS,
    Row,
    assert_only_these_slots_changed,
    assert_only_these_tokens_written,
    bits,
    clone_layout,
    fill_slots,
    ints,
    poisoned_state,
    ranges,
    strided_slots,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def described() -> list[str]:
    """What the table says besides our own kernels, a text a row."""
    choices = prefill_choices(NO_GPU)
    assert [choice.runs for choice in choices[:2]] == ["triton"] * 2
    return [f"{choice.runs} {choice.shapes}: {choice.why}" for choice in choices[2:]]


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    with empty_registry(("flashinfer", 40, 10), ("fla", 20, 1)):
        yield


def shape_of(tokens: Tokens) -> HeadShape:
    sizes = (tokens.k_heads, tokens.v_heads, tokens.key_dim, tokens.value_dim)
    return HeadShape(*sizes, tokens.mixed_qkv.dtype)


def offer(tokens: Tokens, fake: FakeFlashInfer | None = None, grid: int | None = None) -> FakeFlashInfer:
    """A FlashInfer of this convention, tried for the shape of ``tokens``; what the trial called is forgotten."""
    fake = fake or FakeFlashInfer()
    peers.OFFERS.offer(small(flashinfer_peer(fake)))
    peers.try_offers(shape_of(tokens), tokens.mixed_qkv.device, grid)
    fake.calls.clear()
    return fake


def case(length: int, device: str, heads: tuple[int, int] = (1, 2)) -> Tokens:
    return make_tokens(length, device, heads, dims=(DIM, DIM))


def prefill(
    tokens: Tokens,
    state: Tensor,
    rows: list[Row],
    has_state: list[bool],
    packed: PackedRows | None,
    out: Tensor,
    **others: Any,
) -> None:
    gdn.gdn_prefill(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, tokens.device),
        max_query_len=max(end - start for start, end, _ in rows),
        state_slots=strided_slots([slot for _, _, slot in rows], tokens.device),
        has_initial_state=torch.tensor(has_state, device=tokens.device),
        out=out,
        packed=packed,
        backend="triton",
        **others,
    )


def check(
    tokens: Tokens,
    rows: list[Row],
    has_state: list[bool],
    packed: PackedRows | None,
    state_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    out: Tensor | None = None,
) -> Tensor:
    """Outputs and states of the running rows against the formula; no other slot moves. Returns the outputs."""
    state = tokens.state(6, state_dtype, layout)
    running = [(row, has) for row, has in zip(rows, has_state, strict=True) if row[2] >= 0]
    fill_slots(state, [row[2] for row, has in running if has], 0.3)
    before = clone_layout(state)
    out = tokens.out() if out is None else out
    prefill(tokens, state, rows, has_state, packed, out)
    for (start, end, slot), has in running:
        o, states = formula(tokens, start, end, before[slot] if has else None)
        assert_error(out[start:end], o, limit(out.dtype, tokens, "triton", True), f"tokens {start}..{end}")
        assert_error(state[slot], states[-1], limit(state_dtype, tokens, "triton", True), f"slot {slot}")
    assert_only_these_slots_changed(before, state, [row[2] for row, _ in running])
    return out


@pytest.mark.parametrize("heads", [(1, 2), (2, 2), (1, 4)])
@pytest.mark.parametrize("direct", [True, False])
def test_a_peer_serves_ragged_rows(heads: tuple[int, int], direct: bool, device: str) -> None:
    tokens = case(150, device, heads)
    fake = offer(tokens)
    rows, has_state = [(3, 10, 2), (10, 80, 0), (80, 145, 5)], [True, False, True]
    out = nan_like(150, heads[1], DIM, dtype=torch.float32, device=device) if direct else tokens.out()
    out = check(tokens, rows, has_state, PackedRows.of([7, 70, 65], device, 3), out=out)
    assert_only_these_tokens_written(out, rows)
    assert fake.calls == [{"tokens": 142, "rows": 3, "every": 0}]


@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_states_of_any_type_and_layout(state_dtype: torch.dtype, layout: str, device: str) -> None:
    tokens = case(80, device)
    fake = offer(tokens)
    check(tokens, [(0, 70, 4), (70, 80, 1)], [True, False], PackedRows.of([70, 10], device), state_dtype, layout)
    assert len(fake.calls) == 1


def test_skipped_rows_reach_nothing_and_come_out_as_zeros(device: str) -> None:
    """Their tokens are NaN here, as the convolution may leave them."""
    tokens = case(90, device)
    fake = offer(tokens)
    tokens.mixed_qkv[30:50] = float("nan")
    rows = [(0, 30, 3), (30, 50, -1), (50, 90, 1)]
    out = check(tokens, rows, [True, True, False], PackedRows.of([30, 20, 40], device))
    assert not bool(out[30:50].any()) and len(fake.calls) == 1


def test_rows_that_are_not_packed_run_on_our_own_kernels(device: str) -> None:
    tokens = case(83, device)
    fake = offer(tokens)
    check(tokens, [(5, 70, 3), (74, 79, 1), (0, 5, -1), (79, 80, 4)], [True, False, True, True], None)
    assert not fake.calls


@pytest.mark.parametrize("lengths", [[39], [20, 19], [5, 5, 5, 5, 5, 5, 5, 5], [60, 0]])
def test_shapes_below_the_rule_run_on_our_own_kernels(lengths: list[int], device: str) -> None:
    tokens = case(sum(lengths), device)
    fake = offer(tokens)
    packed = PackedRows.of(lengths, device)
    assert peers.choose_peer(shape_of(tokens), packed, tokens.mixed_qkv.device, False) is None
    starts = [0, *packed.cu_seqlens.tolist()[1:]]
    rows = [(starts[i], starts[i + 1], i % 6) for i in range(min(len(lengths), 6))]
    if len(rows) == len(lengths) and 0 not in lengths:
        check(tokens, rows, [True] * len(rows), packed)
    assert not fake.calls


@pytest.mark.parametrize("grid", [64, 128])
def test_snapshots_are_cut_out_of_the_peers_checkpoints(grid: int, device: str) -> None:
    tokens = case(400, device)
    fake = offer(tokens, grid=grid)
    rows, lengths = [(0, 130, 0), (130, 258, 1), (258, 330, 2), (330, 400, -1)], [130, 128, 72, 70]
    state = tokens.state(9)
    fill_slots(state, [0, 1], 0.3)
    before = clone_layout(state)
    positions = ints([128, 128, 7, 64], device, torch.int64)  # on the grid; a whole row; nowhere; a skipped row
    targets = ints([5, 6, 7, 8], device, torch.int64)
    packed = PackedRows.of(lengths, device, snapshot_grid=grid)
    kept = {"snapshot_positions": positions, "snapshot_slots": targets}
    prefill(tokens, state, rows, [True, True, False, True], packed, tokens.out(), **kept)
    assert fake.calls == [{"tokens": 400, "rows": 4, "every": grid}]
    for slot, start, length, initial in ((5, 0, 128, before[0]), (6, 130, 128, before[1])):
        _, states = formula(tokens, start, start + length, initial)
        assert_error(state[slot], states[-1], 1e-5, f"snapshot in slot {slot}")
    assert_only_these_slots_changed(before, state, [0, 1, 2, 5, 6])


def test_a_peer_that_keeps_no_checkpoints_leaves_snapshots_to_us(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = case(70, device)
    fake = offer(tokens)  # not tried with checkpoints
    packed = PackedRows.of([70], device)
    choose = (shape_of(tokens), packed, tokens.mixed_qkv.device)
    assert peers.choose_peer(*choose, False) is not None and peers.choose_peer(*choose, True) is None
    offer(tokens, fake, grid=64)
    assert peers.choose_peer(*choose, True) is not None
    monkeypatch.setattr(peers, "MOST_CHECKPOINT_BYTES", 4 * 2 * DIM * DIM - 1)
    assert peers.choose_peer(*choose, True) is None


def test_an_offer_of_another_convention_is_withdrawn_with_the_reason(device: str) -> None:
    tokens = case(60, device)
    offer(tokens, FakeFlashInfer(transposed=True))
    assert peers.choose_peer(shape_of(tokens), PackedRows.of([60], device), tokens.mixed_qkv.device, False) is None
    assert "no flashinfer: its results differ from this plugin's by" in dispatch.describe("cuda")["gdn_prefill"]


def test_an_offer_that_raises_is_withdrawn_with_the_reason(device: str) -> None:
    def broken(*, backend: str, **arguments: Any) -> None:
        raise RuntimeError("no compiler\nin this place")

    tokens = case(60, device)
    peers.OFFERS.offer(small(flashinfer_peer(broken)))
    peers.try_offers(shape_of(tokens), tokens.mixed_qkv.device)
    assert dispatch.describe("cuda")["gdn_prefill"].endswith("; no flashinfer: RuntimeError: no compiler)")


def test_an_offer_for_other_heads_is_not_tried(device: str) -> None:
    fake = FakeFlashInfer()
    tokens = case(60, device)
    peers.OFFERS.offer(flashinfer_peer(fake))
    peers.try_offers(shape_of(tokens), tokens.mixed_qkv.device)
    (said,) = described()
    assert not fake.calls and "not for torch.float32 tokens with heads of 16" in said


def test_what_is_chosen_is_described(device: str) -> None:
    hoped = "where the engine has it and its trial at start succeeds"
    assert described() == [
        f"flashinfer from 40 tokens on, 10 a row: {hoped}",
        f"fla from 20 tokens on, 1 a row: {hoped}",
    ]
    tokens = case(60, device)
    fake = offer(tokens)
    by, tried = "flashinfer from 40 tokens on, 10 a row", "the engine's, tried at its start"
    assert described() == [f"{by}, not where snapshots are kept: {tried}"]
    assert dispatch.describe("cuda")["gdn_prefill"].endswith(f"; {by}, not where snapshots are kept: {tried})")
    offer(tokens, fake, grid=64)
    peers.OFFERS.say_missing("fla", "not in this engine")
    assert described() == [f"{by}: {tried}", "triton no fla: not in this engine"]


def test_the_first_rule_that_fits_decides_and_a_wish_overrides_it(device: str) -> None:
    tokens = case(60, device)
    flashinfer = small(flashinfer_peer(FakeFlashInfer()))

    def by_log_decay(call: PeerCall) -> tuple[Tensor, Tensor | None]:
        return flashinfer.function(replace(call, decay=call.decay.exp()))

    peers.OFFERS.offer(flashinfer)
    peers.OFFERS.offer(replace(flashinfer, name="fla", function=by_log_decay, log_decay=True))
    where = tokens.mixed_qkv.device
    peers.try_offers(shape_of(tokens), where)

    def chosen(length: int) -> str | None:
        peer = peers.choose_peer(shape_of(tokens), PackedRows.of([length], device), where, False)
        return None if peer is None else peer.name

    assert [chosen(length) for length in (10, 20, 39, 40)] == [None, "fla", "fla", "flashinfer"]
    for wish, expected in (("own", None), ("fla", "fla"), ("flashinfer", "flashinfer")):
        peers.OFFERS.prefer(wish)
        assert [chosen(length) for length in (1, 60)] == [expected] * 2
    assert any(text.startswith("flashinfer wherever it can, as asked") for text in described())


def test_a_wish_that_cannot_be_had_is_refused(device: str) -> None:
    tokens = case(60, device)
    peers.OFFERS.prefer("fla")
    with pytest.raises(
        ValueError, match="prefill by 'fla' was asked for.*no engine offers it; ask for 'auto' or 'own'"
    ):
        peers.try_offers(shape_of(tokens), tokens.mixed_qkv.device)
    peers.OFFERS.say_missing("fla", "not in this engine")
    with pytest.raises(ValueError, match="it cannot be had: not in this engine"):
        peers.try_offers(shape_of(tokens), tokens.mixed_qkv.device)


@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("width", [2, 4, 8])
def test_a_peer_behind_the_convolution(width: int, layout: str, device: str) -> None:
    """Outputs, states, windows and snapshots are those of the convolution and our own kernels, one after the other."""
    tokens = case(150, device, (3, 6))
    fake = offer(tokens, grid=64)
    rows, has_state = [(3, 5, 2), (5, 75, 0), (75, 76, -1), (76, 77, 5), (77, 147, 4)], [True, False, True, False, True]
    tokens.mixed_qkv[75] = float("nan")
    channels = tokens.mixed_qkv.shape[1]
    weight = torch.randn(channels, width, device=device)
    windows = poisoned_state((10, channels, width), torch.float32, device, layout)
    state = tokens.state(10, layout=layout)
    for each in (windows, state):
        fill_slots(each, [0, 2, 4, 5], 0.3)
    kept = {
        "snapshot_positions": ints([2, 64, 1, 1, 70], device, torch.int64),
        "snapshot_slots": ints([6, 7, 8, -1, 9], device, torch.int64),
    }
    results = []
    for packed in (PackedRows.of([2, 70, 1, 1, 70], device, 3, snapshot_grid=64), None):
        own = clone_layout(windows), clone_layout(state)
        out = tokens.out()
        convolution = gdn.Convolution(weight, own[0])
        prefill(tokens, own[1], rows, has_state, packed, out, convolution=convolution, **kept)
        results.append((*own, out))
    assert [call["tokens"] for call in fake.calls] == [144]
    (fused_windows, *fused), (own_windows, *apart) = results
    assert torch.equal(bits(fused_windows.contiguous()), bits(own_windows.contiguous()))
    written = [0, 2, 4, 5, 6, 7, 9]
    assert_only_these_slots_changed(state, fused[0], written)
    assert_error(fused[0][written], apart[0][written].double(), 1e-5, "states")
    live = [*range(3, 75), *range(76, 147)]
    assert_error(fused[1][live], apart[1][live].double(), 1e-5, "outputs")


def test_tables_of_chunks() -> None:
    packed = PackedRows.of([65, 64, 1], "cpu", first=9)
    assert packed.tokens == 130 and packed.cu_seqlens.tolist() == [0, 65, 129, 130]
    assert packed.chunk_indices.tolist() == [[0, 0], [0, 1], [1, 0], [2, 0]]
    assert packed.chunk_offsets.tolist() == [0, 2, 3, 4]
    assert packed.checkpoints == 2 and packed.checkpoint_offsets.tolist() == [0, 1, 2, 2]


@pytest.mark.parametrize(
    ("packed", "message"),
    [
        (PackedRows.of([2, 2], "cpu"), "packed has 2 lengths, but query_start names 1 rows"),
        (PackedRows.of([4], "cpu", first=1), "packed covers tokens 1 to 5, but the batch has 4"),
        (PackedRows(0, (4,), torch.zeros(2, dtype=torch.int32)), "packed.cu_seqlens is torch.int32"),
    ],
)
def test_bad_packed_rows_are_named(packed: PackedRows, message: str, device: str) -> None:
    tokens, packed = make_tokens(4, device), replace(packed, cu_seqlens=packed.cu_seqlens.to(device))
    with pytest.raises(ValueError, match=message):
        prefill(tokens, tokens.state(2), [(0, 4, 1)], [False], packed, tokens.out())


@pytest.mark.parametrize("keeps", [False, True])
def test_what_lies_around_an_offer_is_launched_without_it(
    keeps: bool, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For a warm-up: rows are skipped, so no state is read or written; what was not tried so is left out."""
    tokens, nothing = case(2, device), ints([0, 0], device)
    skipped = ints([-1, -1], device)
    state, launched = tokens.state(3), []
    run_peer = peers.run_peer

    def noted(peer: peers.Peer, *arguments: Any) -> None:
        launched.append(peer.name)
        run_peer(peer, *arguments)

    monkeypatch.setattr(peers, "run_peer", noted)

    def launch() -> list[str]:
        launched.clear()
        gates = (tokens.a, tokens.b, tokens.A_log, tokens.dt_bias)
        ranges_and_slots = (nothing, nothing, 1, skipped, nothing.bool(), tokens.out())
        packed, snapshot = PackedRows.of([1, 1], device), (skipped, skipped) if keeps else None
        peers.launch_around_peers(packed, tokens.mixed_qkv, gates, state, tokens.k_heads, *ranges_and_slots, snapshot)
        return launched

    fake = offer(tokens)
    assert launch() == ([] if keeps else ["flashinfer"])
    offer(tokens, fake, grid=64)
    assert launch() == ["flashinfer"]
    assert not fake.calls and bool(state.isnan().all())
