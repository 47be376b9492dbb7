"""The prefill over workspaces in tiles, which an H200's table names, against the float64 formula."""

from collections.abc import Iterator
from itertools import accumulate

import pytest
import torch

from qwen3next_plugin.kernels.gdn import config, triton_tiled
from qwen3next_plugin.kernels.gpus import Target
from qwen3next_plugin.kernels.ranges import BLOCK_ROWS

from .common import DTYPES, assert_repeatable
from .gdn_case import check_prefill, make_tokens, over_tiles, run_prefill
from .slots import STATE_LAYOUTS, clone_layout, fill_slots
from .test_gdn_prefill import RAGGED
from .test_snapshots import check_no_bit_changes, check_states_within

DIMS, BF16 = (64, 64), torch.bfloat16


@pytest.fixture(autouse=True)
def _an_h200s_table(poisoned_memory: None) -> Iterator[None]:
    table = config.shipped(Target("NVIDIA H200", (9, 0)))
    with config.forced(config.only(table, table.prefill[-1].way)):
        yield


def test_what_runs_over_tiles(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """bfloat16 and heads of 64 or 128; all else is prefilled as by a table that says nothing."""
    ran: list[bool] = []
    monkeypatch.setattr(triton_tiled, "gdn_prefill", lambda *arguments: ran.append(True))
    for dims, dtype, expected in (
        ((64, 128), BF16, True),
        ((64, 64), torch.float32, False),
        ((64, 64), torch.float16, False),
        ((16, 64), BF16, False),
    ):
        tokens = make_tokens(2, device, dims=dims, dtype=dtype)
        ran.clear()
        run_prefill(tokens, tokens.state(2), [(0, 2, 1)], [False], "triton")
        assert bool(ran) is over_tiles(tokens) is expected
    check_prefill(make_tokens(66, device, dims=(24, 40), dtype=BF16), [(0, 66, 1)], [True], "triton")


@pytest.mark.parametrize("has_state", [False, True])
@pytest.mark.parametrize("length", [1, 63, 64, 65, 130])
def test_one_row(length: int, has_state: bool, device: str) -> None:
    check_prefill(make_tokens(length, device, dims=DIMS, dtype=BF16), [(0, length, 2)], [has_state], "triton")


@pytest.mark.parametrize("heads", [(2, 2), (1, 2), (1, 4), (4, 8), (8, 16)])
def test_ragged_rows_out_of_order(heads: tuple[int, int], device: str) -> None:
    tokens = make_tokens(83, device, heads, DIMS, BF16)
    check_prefill(tokens, RAGGED, [True, True, False, True, True], "triton")


def test_all_heads_of_the_published_size(device: str) -> None:
    check_prefill(make_tokens(5, device, (16, 32), DIMS, BF16), [(0, 3, 1), (3, 5, 0)], [True, False], "triton")


@pytest.mark.parametrize("dims", [(128, 128), (64, 128), (128, 64)])
def test_sizes_of_heads(dims: tuple[int, int], device: str) -> None:
    tokens = make_tokens(150, device, dims=dims, dtype=BF16)
    check_prefill(tokens, [(3, 140, 1), (140, 150, 0)], [True, False], "triton")


@pytest.mark.parametrize("layout", STATE_LAYOUTS)
@pytest.mark.parametrize("state_dtype", DTYPES)
def test_state_dtypes_and_layouts(state_dtype: torch.dtype, layout: str, device: str) -> None:
    tokens = make_tokens(70, device, dims=DIMS, dtype=BF16)
    check_prefill(tokens, [(2, 67, 3), (68, 70, 0)], [True, False], "triton", state_dtype, layout)


def test_strong_decay_does_not_overflow(device: str) -> None:
    tokens = make_tokens(70, device, dims=DIMS, dtype=BF16)
    tokens.A_log.fill_(5.0)
    tokens.a.fill_(8.0)  # g is about -1300 a token: exp(-G) would be infinite
    check_prefill(tokens, [(0, 70, 1)], [True], "triton")


def test_zero_keys_and_queries(device: str) -> None:
    tokens = make_tokens(20, device, dims=DIMS, dtype=BF16)
    tokens.mixed_qkv[3:9, :128] = 0.0
    check_prefill(tokens, [(0, 20, 1)], [True], "triton")


def test_no_rows_and_no_tokens(device: str) -> None:
    check_prefill(make_tokens(4, device, dims=DIMS, dtype=BF16), [], [], "triton")
    nothing = [(0, 0, 1), (4, 4, 2), (0, 4, -1)]
    check_prefill(make_tokens(4, device, dims=DIMS, dtype=BF16), nothing, [True, False, True], "triton")
    check_prefill(make_tokens(0, device, dims=DIMS, dtype=BF16), [(0, 0, 1)], [True], "triton")


def test_more_rows_than_are_looked_through_at_a_time(device: str) -> None:
    """Rows of none to two tokens, the last ones first; chunks are numbered over all of them."""
    count = BLOCK_ROWS + 10
    lengths = [n % 3 for n in range(count)]
    ends = list(accumulate(lengths))
    rows = [(end - length, end, n) for n, (length, end) in enumerate(zip(lengths, ends, strict=True))][::-1]
    tokens = make_tokens(ends[-1], device, (1, 1), DIMS, BF16)
    check_prefill(tokens, rows, [row[2] % 2 == 0 for row in rows], "triton", slots=count)


@pytest.mark.parametrize("state_dtype", [torch.float32, BF16])
def test_snapshots(state_dtype: torch.dtype, device: str) -> None:
    check_states_within(make_tokens(206, device, (1, 1), DIMS, BF16), "contiguous", state_dtype, "triton")
    check_no_bit_changes(make_tokens(130, device, dims=DIMS, dtype=BF16), "triton")


def test_the_same_every_time(device: str) -> None:
    """Ragged rows from the same states, on a GPU a thousand times in the published shape."""
    heads, dims = ((16, 32), (128, 128)) if device == "cuda" else ((1, 2), DIMS)
    tokens = make_tokens(150, device, heads, dims, BF16)
    state = tokens.state(4)
    fill_slots(state, range(4), 0.3)

    def run() -> tuple[torch.Tensor, torch.Tensor]:
        own = clone_layout(state)
        return run_prefill(tokens, own, [(0, 70, 3), (70, 71, 1), (71, 150, 0)], [True, True, False], "triton"), own

    assert_repeatable(run)
