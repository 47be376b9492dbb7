"""A decode step in one launch: outputs and both states against the float64 formula, and nothing else may move."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qwen3next_plugin.kernels import conv, gdn, norm
from qwen3next_plugin.kernels.gdn import config, triton_decode
from qwen3next_plugin.kernels.gdn.table import DecodeTile

from .common import BACKENDS, DTYPES
from .gdn_case import assert_error, limit
from .layer_case import EPS, Layer, make_layer
from .slots import (
    STATE_LAYOUTS,
    Row,
    assert_only_these_slots_changed,
    bits,
    clone_layout,
    fill_slots,
    ints,
    ranges,
    strided_slots,
)

pytestmark = pytest.mark.usefixtures("poisoned_memory")
# Out of order, an empty row, a skipped one, and tokens 2 and 5 in no row.
ROWS = [(3, 4, 2), (0, 1, 5), (1, 1, 0), (1, 2, -1), (4, 5, 1)]


def run(
    layer: Layer, windows: Tensor, state: Tensor, rows: Sequence[Row], backend: str | None, **options: Any
) -> Tensor:
    """Call gdn_decode_fused on these rows; returns its output, poisoned before."""
    out = layer.tokens.out()
    gdn.gdn_decode_fused(
        *layer.arguments(),
        windows,
        state,
        num_k_heads=layer.tokens.k_heads,
        norm_eps=EPS,
        **ranges(rows, layer.tokens.device),
        state_slots=strided_slots([slot for _, _, slot in rows], layer.tokens.device),
        out=out,
        backend=backend,
        **options,
    )
    return out


@contextmanager
def tile_of(elements: int, stages: int, device: str, warps: int = 2) -> Iterator[None]:
    """Every decode goes through its states in such tiles."""
    table = config.table_of(torch.device(device))
    with config.forced(config.only(table, DecodeTile(elements, warps, stages))):
        yield


def check(
    layer: Layer,
    rows: Sequence[Row],
    backend: str | None,
    *,
    state_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    spare_columns: int = 0,
    snapshots: Sequence[int] | None = None,
) -> None:
    tokens, taps = layer.tokens, layer.conv_weight.shape[1] - 1
    dtype, device = tokens.mixed_qkv.dtype, tokens.device
    slots = max(6, len(rows)) if snapshots is None else 12
    windows, state = layer.windows(slots, taps + spare_columns, dtype, layout), tokens.state(slots, state_dtype, layout)
    running = [(n, start, slot) for n, (start, end, slot) in enumerate(rows) if slot >= 0 and end > start]
    fill_slots(windows, [slot for _, _, slot in running])
    fill_slots(state, [slot for _, _, slot in running], 0.3)
    windows[:, :, taps:] = float("nan")  # of a verification: neither read nor written
    before = clone_layout(windows), clone_layout(state)
    idle = [token for token in range(tokens.mixed_qkv.shape[0]) if token not in {start for _, start, _ in running}]
    for padding in (tokens.mixed_qkv, layer.z, tokens.a, tokens.b):
        padding[idle] = float("nan")
    options = {} if snapshots is None else {"snapshot_slots": ints(snapshots, device)}
    out = run(layer, windows, state, rows, backend, **options)

    written = []
    for n, start, slot in running:
        o, (window,), (new_state,) = layer.expected(start, start + 1, before[0][slot], before[1][slot])
        assert_error(out[start], o[0], limit(out.dtype, tokens, backend), f"token {start}")
        assert torch.equal(windows[slot, :, :taps].cpu().double(), window), f"window in slot {slot}"
        assert_error(state[slot], new_state, limit(state_dtype, tokens, backend), f"slot {slot}")
        written.append(slot)
        kept = -1 if snapshots is None else snapshots[n]
        if kept >= 0:
            assert torch.equal(windows[kept, :, :taps], windows[slot, :, :taps]), f"window in snapshot {kept}"
            assert torch.equal(bits(state[kept]), bits(state[slot])), f"snapshot {kept}"
            written.append(kept)
    assert not bool(out[idle].any()), "a token that no row decodes has an output"  # NaN would count as one
    for old, new in zip(before, (windows, state), strict=True):
        assert_only_these_slots_changed(old, new, written)
    assert torch.equal(bits(windows[:, :, taps:].contiguous()), bits(before[0][:, :, taps:].contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_batch_of_one(backend: str, device: str) -> None:
    check(make_layer(1, device), [(0, 1, 3)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4), (2, 4), (1, 3), (4, 8), (16, 32)])
def test_ragged_rows(heads: tuple[int, int], backend: str, device: str) -> None:
    check(make_layer(6, device, heads, (8, 8)), ROWS, backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, backend: str, device: str) -> None:
    layer = make_layer(6, device, dtype=torch.bfloat16)
    check(layer, ROWS, backend, state_dtype=state_dtype, layout=layout, spare_columns=2)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dims", [(16, 16), (12, 20), (24, 40), (5, 3)])
def test_token_dtypes_and_head_dims(dims: tuple[int, int], dtype: torch.dtype, backend: str, device: str) -> None:
    check(make_layer(3, device, dims=dims, dtype=dtype), [(0, 1, 3), (2, 3, 1)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [2, 3, 8])
def test_convolution_widths(width: int, backend: str, device: str) -> None:
    check(make_layer(6, device, width=width), ROWS, backend, spare_columns=1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("layout", STATE_LAYOUTS)
def test_snapshots(layout: str, state_dtype: torch.dtype, backend: str, device: str) -> None:
    layer = make_layer(6, device, dtype=torch.float16)
    check(layer, ROWS, backend, state_dtype=state_dtype, layout=layout, snapshots=[7, -1, 8, 9, 10])


@pytest.mark.parametrize("backend", BACKENDS)
def test_padding_before_behind_and_in_place_of_rows(backend: str, device: str) -> None:
    """As engines pad a captured batch: rows of slot -1, empty rows behind the last token, tokens without any row."""
    check(make_layer(5, device), [(0, 1, 2), (1, 2, -1), (2, 3, -1), (3, 4, 1), (4, 5, -1)], backend)
    check(make_layer(4, device), [(0, 1, 2), (1, 2, 0), (2, 2, 0), (2, 2, 0)], backend)
    check(make_layer(6, device), [(0, 1, 4)], backend)
    check(make_layer(2, device), [(1, 1, 3), (1, 1, -1), (0, 0, 5), (1, 2, 2), (0, 1, 1)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_rows(backend: str, device: str) -> None:
    check(make_layer(2, device), [], backend)
    check(make_layer(2, device), [(0, 0, 1), (0, 1, -1)], backend)
    check(make_layer(0, device), [(0, 0, 1)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_only_the_first_token_of_a_longer_row(backend: str, device: str) -> None:
    check(make_layer(4, device), [(2, 4, 1), (0, 2, 3)], backend)


def test_a_row_far_behind_finds_its_token(device: str) -> None:
    """More rows than a program looks through at once, in reverse."""
    count = 131
    layer = make_layer(count + 1, device, heads=(1, 1), dims=(2, 2))
    rows = [(count - 1 - n, count - n, 2 if n == 0 else 4 if n == count - 1 else -1) for n in range(count)]
    check(layer, rows, "triton")


@given(slots=st.lists(st.integers(-1, 5), min_size=1, max_size=4, unique_by=lambda s: s if s >= 0 else object()))
@pytest.mark.parametrize("backend", BACKENDS)
def test_any_batch(backend: str, device: str, slots: list[int]) -> None:
    check(make_layer(len(slots), device, heads=(1, 1)), [(t, t + 1, slot) for t, slot in enumerate(slots)], backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_is_the_three_operations_one_after_another(backend: str, device: str) -> None:
    """Several steps of two sequences; in float32, where these do not round in between."""
    layer = make_layer(8, device, heads=(2, 4))
    tokens, slots = layer.tokens, [3, 1]
    windows, state = layer.windows(4, 3, torch.float32, "transposed"), tokens.state(4)
    fill_slots(windows, slots)
    fill_slots(state, slots)
    own_windows, own_state = clone_layout(windows), clone_layout(state)
    for step in range(4):
        rows = [(2 * step + n, 2 * step + n + 1, slot) for n, slot in enumerate(slots)]
        out = run(layer, windows, state, rows, backend)
        shared = {**ranges(rows, device), "state_slots": ints(slots, device), "backend": backend}
        convolved, core = torch.zeros_like(tokens.mixed_qkv), out.new_zeros(out.shape)
        conv.causal_conv1d_update(
            tokens.mixed_qkv,
            layer.conv_weight,
            None,
            own_windows,
            num_accepted_tokens=None,
            max_query_len=1,
            out=convolved,
            **shared,
        )
        gdn.gdn_decode(convolved, *tokens.arguments()[1:], own_state, num_k_heads=2, out=core, **shared)
        norm.rms_norm_gated(core, layer.z, layer.norm_weight, EPS, out=core, backend=backend)
        assert_error(out, core.cpu().double(), 1e-5, f"step {step}")
    assert torch.equal(windows[slots], own_windows[slots])
    assert_error(state[slots], own_state[slots].cpu().double(), 1e-5, "states")


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_repeats_to_the_bit(backend: str, device: str) -> None:
    layer = make_layer(6, device, dtype=torch.bfloat16)
    windows, state = layer.windows(6, 3, torch.bfloat16, "contiguous"), layer.tokens.state(6, torch.bfloat16)
    fill_slots(windows, range(6))
    fill_slots(state, range(6))
    states = [(windows, state), (clone_layout(windows), clone_layout(state))]
    outs = [run(layer, *own, ROWS, backend) for own in states]
    for one, other in zip((outs[0], *states[0]), (outs[1], *states[1]), strict=True):
        assert torch.equal(bits(one.contiguous()), bits(other.contiguous()))


@pytest.mark.parametrize("snapshots", [None, [7, -1, 8, 9, 10]], ids=["alone", "snapshots"])
@pytest.mark.parametrize("stages", [1, 3])
@pytest.mark.parametrize("heads", [(2, 2), (1, 3), (2, 4), (4, 8), (8, 16), (16, 32)])
def test_tiles(heads: tuple[int, int], stages: int, snapshots: list[int] | None, device: str) -> None:
    """In registers and in stages: several tiles a head, rows that are skipped or of no token, tokens of no row."""
    with tile_of(16, stages, device):
        check(make_layer(6, device, heads, (8, 8)), ROWS, "triton", snapshots=snapshots)


@pytest.mark.parametrize("elements", [16, 64, 1024])
@pytest.mark.parametrize("dims", [(16, 16), (12, 20), (24, 40), (40, 3), (5, 7)])
def test_staged_tiles_of_heads_that_are_no_powers_of_two(dims: tuple[int, int], elements: int, device: str) -> None:
    """And of heads with a row a tile, a last tile that is not full, or one tile in all."""
    with tile_of(elements, 3, device):
        check(make_layer(6, device, (2, 6), dims, torch.bfloat16), ROWS, "triton", snapshots=[7, -1, 8, 9, 10])


@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_staged_tiles_of_every_type_and_layout(
    dtype: torch.dtype, state_dtype: torch.dtype, layout: str, device: str
) -> None:
    layer = make_layer(6, device, dtype=dtype)
    snapshots = [7, -1, 8, 9, 10] if dtype == torch.float16 else None
    with tile_of(32, 3, device):
        check(layer, ROWS, "triton", state_dtype=state_dtype, layout=layout, spare_columns=2, snapshots=snapshots)


@pytest.mark.parametrize("width", [2, 8])
def test_staged_tiles_of_other_widths_and_batches(width: int, device: str) -> None:
    with tile_of(32, 3, device):
        check(make_layer(5, device, width=width), [(0, 1, 2), (1, 2, -1), (2, 2, 0), (3, 4, 1), (4, 5, -1)], "triton")
        check(make_layer(4, device, width=width), [(2, 4, 1), (0, 2, 3)], "triton")
        check(make_layer(2, device, width=width), [(1, 1, 3), (1, 1, -1), (0, 0, 5), (1, 2, 2), (0, 1, 1)], "triton")
        check(make_layer(2, device, width=width), [], "triton")


def test_staged_tiles_repeat_to_the_bit_and_move_the_state_as_others_do(device: str) -> None:
    """What a step of the kernel's other form leaves is what this one leaves: tiles are rows, whose sums stay whole."""
    layer = make_layer(6, device, dtype=torch.bfloat16)
    windows, state = layer.windows(6, 3, torch.bfloat16, "contiguous"), layer.tokens.state(6)
    fill_slots(windows, range(6))
    fill_slots(state, range(6))
    results = []
    for stages in (3, 3, 5, 1):
        own = clone_layout(windows), clone_layout(state)
        with tile_of(32, stages, device):
            results.append((run(layer, *own, ROWS, "triton"), *own))
    for other in results[1:3]:
        assert all(
            torch.equal(bits(x.contiguous()), bits(y.contiguous())) for x, y in zip(results[0], other, strict=True)
        )
    assert torch.equal(bits(results[0][1].contiguous()), bits(results[3][1].contiguous()))
    assert_error(results[3][2], results[0][2].cpu().double(), 1e-6, "states")


def test_stages_are_of_tiles_of_a_head_alone(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A head that is no larger than a tile is held whole, as without stages."""
    launched: list[tuple[str, int]] = []

    class Noted:
        def __init__(self, name: str) -> None:
            self.name = name

        def __getitem__(self, grid: Any) -> Any:
            return lambda *_, **options: launched.append((self.name, options.get("STAGES", 1)))

    monkeypatch.setattr(triton_decode, "_gdn_decode_kernel", Noted("registers"))
    monkeypatch.setattr(triton_decode, "gdn_decode_staged_kernel", Noted("stages"))
    layer = make_layer(1, device)
    for elements, stages in ((128, 3), (32, 1), (32, 3), (1, 5)):
        with tile_of(elements, stages, device):
            run(layer, layer.windows(4, 3, torch.float32, "contiguous"), layer.tokens.state(4), [(0, 1, 1)], "triton")
    assert launched == [("registers", 1), ("registers", 1), ("stages", 3), ("stages", 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": torch.zeros(2, 2, 4)}, r"z has shape \(2, 2, 4\); \(2, 2, 8\) is needed"),
        ({"norm_weight": torch.zeros(4)}, r"norm_weight has shape \(4,\); \(8,\) is needed"),
        ({"conv_weight": torch.zeros(9, 4)}, r"weight has shape \(9, 4\); \(48, 4\) is needed"),
        ({"conv_state": torch.zeros(3, 48, 2)}, r"conv_state has shape \(3, 48, 2\): width 4 needs at least 3 columns"),
        ({"state_slots": torch.zeros(1).int()}, r"state_slots has shape \(1,\); \(2,\) is needed"),
        ({"snapshot_slots": torch.zeros(2)}, "snapshot_slots is torch.float32"),
    ],
)
def test_bad_arguments_are_named(change: dict[str, Tensor], message: str) -> None:
    layer = make_layer(2, "cpu")
    names = ("mixed_qkv", "z", "a", "b", "conv_weight", "A_log", "dt_bias", "norm_weight")
    good: dict[str, Any] = dict(zip(names, layer.arguments(), strict=True)) | {
        "conv_state": torch.zeros(3, 48, 3),
        "ssm_state": layer.tokens.state(3),
        "num_k_heads": 1,
        "norm_eps": EPS,
        "query_start": ints([0, 1], "cpu"),
        "query_end": ints([1, 2], "cpu"),
        "state_slots": ints([0, 1], "cpu"),
        "out": layer.tokens.out(),
    }
    with pytest.raises(ValueError, match=message):
        gdn.gdn_decode_fused(**(good | change))


@pytest.mark.gpu
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("heads", [(16, 32), (8, 16), (4, 8)])
@pytest.mark.parametrize("rows", [1, 6, 64])
def test_real_shapes(rows: int, heads: tuple[int, int], state_dtype: torch.dtype, device: str) -> None:
    layer = make_layer(rows, device, heads, (128, 128), torch.bfloat16)
    check(layer, [(t, t + 1, t) for t in range(rows)], None, state_dtype=state_dtype, layout="pages")


@pytest.mark.gpu
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stages", [1, 2, 3, 5])
@pytest.mark.parametrize("heads", [(16, 32), (8, 16), (4, 8)])
def test_tiles_of_real_shapes(
    heads: tuple[int, int], stages: int, state_dtype: torch.dtype, layout: str, device: str
) -> None:
    layer = make_layer(6, device, heads, (128, 128), torch.bfloat16)
    with tile_of(1024, stages, device):
        check(layer, ROWS, None, state_dtype=state_dtype, layout=layout, snapshots=[7, -1, 8, 9, 10])


@pytest.mark.gpu
@pytest.mark.parametrize("stages", [None, 3])
@pytest.mark.parametrize("state_dtype", [torch.float32, torch.bfloat16])
def test_a_thousand_times_the_same(state_dtype: torch.dtype, stages: int | None, device: str) -> None:
    """From the same states, with windows in vLLM's layout: what one program moved, no other may have read."""
    layer = make_layer(24, device, (16, 32), (128, 128), torch.bfloat16)
    windows, state = layer.windows(24, 3, torch.bfloat16, "transposed"), layer.tokens.state(24, state_dtype)
    fill_slots(windows, range(24))
    fill_slots(state, range(24))
    first: list[Tensor] = []
    for _ in range(1000):
        own = clone_layout(windows), clone_layout(state)
        with nullcontext() if stages is None else tile_of(1024, stages, device):
            results = (run(layer, *own, [(t, t + 1, t) for t in range(24)], None), *own)
        first = first or [result.clone() for result in results]
        assert all(torch.equal(one, other) for one, other in zip(first, results, strict=True))
