"""The mixture of experts for few tokens, by whole rows: which of them go that way, and what comes of it."""

import pytest
import torch

from qwen3next_plugin.kernels import early, moe
from qwen3next_plugin.kernels.moe import ways
from qwen3next_plugin.kernels.moe.config import forced
from qwen3next_plugin.kernels.moe.triton import experts as experts_module
from qwen3next_plugin.kernels.moe.triton import few

from .common import assert_close, assert_repeatable
from .moe_case import Problem, problem, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")


def test_few_tokens_are_not_sorted(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """Up to MAX_TOKENS of them, unless activations are to be rounded or a tile was forced on us."""
    monkeypatch.setattr(experts_module, "fused_moe_few", lambda x, *_: torch.full_like(x, 7.0))

    def short_way(tokens: int, weights: str = "float") -> bool:
        return bool((problem(random_ids(tokens, 3, 2, device), 3, 32, 16, weights).run("triton") == 7.0).all())

    assert short_way(1) and short_way(ways.MAX_TOKENS) and short_way(1, "fp8")
    assert not short_way(ways.MAX_TOKENS + 1) and not short_way(1, "fp8 activations")
    with forced(moe.config.default_config(2, 3, 4)):
        assert not short_way(1)


@pytest.mark.parametrize("weights", ["bf16", "blocks", "rows", "int8"])
def test_every_number_of_tokens_around_the_threshold(weights: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole rows, begun early or not; then tiles apart as long as pairs are few; formats that need tiles have them."""
    monkeypatch.setattr(ways, "can_begin_early", lambda device: True)
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    types = {"bf16": torch.bfloat16, "int8": torch.int8}
    w13 = torch.empty(513, 64, 256, dtype=types.get(weights, torch.float8_e4m3fn), device="meta")
    scale = {"blocks": torch.empty(513, 2, 2, device="meta"), "bf16": None}.get(weights, torch.empty(513, 64, 1))
    for tokens in range(1, 24):
        way = ways.choose_way(tokens, 11, 2, w13, scale, None, 1)
        rows = weights in ("bf16", "blocks") and tokens <= ways.MAX_TOKENS
        assert (way.config is None) == rows
        assert way.early == (not rows or tokens <= ways.EARLY_TOKENS)
        assert way.apart == (not rows and tokens <= 17), "187 pairs, and 198"
        assert way.quantize == (weights == "blocks" and tokens > ways.MAX_TOKENS), "not decided by anybody"
        rounded = ways.choose_way(tokens, 11, 2, w13, scale, True, 1)
        assert rounded.config is not None and rounded.apart == (tokens <= 17) and rounded.early


def test_launches_begin_early_on_gpus_that_can(monkeypatch: pytest.MonkeyPatch) -> None:
    """From compute capability 9.0 on, and never in the interpreter or on a CPU."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (device.index, 0))
    monkeypatch.setattr(early, "interpreting", lambda: False)
    found = [early.can_begin_early(torch.device("cuda", major)) for major in (8, 9, 12)]
    assert found == [False, torch.version.hip is None, torch.version.hip is None]
    rows = [early.begins_early(torch.device("cuda", 9), rows) for rows in (1, early.EARLY_ROWS, early.EARLY_ROWS + 1)]
    assert rows == [found[1], found[1], False]
    assert not early.can_begin_early(torch.device("cpu"))
    monkeypatch.setattr(early, "interpreting", lambda: True)
    assert not early.can_begin_early(torch.device("cuda", 9))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weights", ["float", "fp8", "fp8 slices"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_few_tokens(tokens: int, weights: str, dtype: torch.dtype, device: str) -> None:
    """Two choices and the shared expert; all of one choice; on one rank of those that share the experts."""
    experts, inner, block = 6, 72 if weights == "fp8 slices" else 20, 64 if weights == "fp8 slices" else None
    ids = torch.nn.functional.pad(random_ids(tokens, experts - 1, 2, device), (0, 1), value=experts - 1)
    kept = problem(ids, experts, 136, inner, weights.split()[0], dtype, inner_block=block)
    skewed, skipped = torch.full_like(ids, 5), torch.where(ids % 3 == 0, -1, ids)
    skipped[0, :2], skipped[-1, 0] = -1, experts  # of the first token only the shared one is here
    for chosen in (ids, skewed, skipped):
        x, w13, w2, router, _, *scales = kept.tensors
        case = Problem((x, w13, w2, router, chosen, *scales), False)
        assert_close(case.run("triton"), case.expected(), case.limit("triton", device))
    assert_repeatable(case.run, "triton")


@pytest.mark.parametrize("weights", ["float", "fp8"])
@pytest.mark.parametrize("choices", [1, 2, 3, 8, 10, 11, 16])
def test_any_number_of_choices(choices: int, weights: str, device: str) -> None:
    """In one part or two, with experts that tokens share and some that are elsewhere; ids and weights lie in others."""
    tokens, experts = 3, 17
    wide = random_ids(tokens, experts, choices + 1, device)
    wide[1] = wide[0].flip(0)
    if choices > 1:
        wide[0, choices // 2], wide[2, 1] = -1, experts
    case = problem(wide[:, :choices], experts, 20, 16, weights, torch.bfloat16)
    x, w13, w2, router, ids, *scales = case.tensors
    strided = torch.cat([router, torch.full_like(router, torch.nan)], 1)[:, :choices]
    case = Problem((x, w13, w2, strided, ids, *scales), False)
    assert ids.stride(0) == choices + 1 and strided.stride(0) == 2 * choices
    assert_close(case.run("triton"), case.expected(), case.limit("triton", device))


@pytest.mark.parametrize("tokens", [8, 9, 16, 17])
def test_both_sides_of_every_threshold(tokens: int, device: str) -> None:
    """Eleven choices, the last one shared: the same output, whichever way it comes."""
    ids = torch.nn.functional.pad(random_ids(tokens, 40, 10, device), (0, 1), value=40)
    case = problem(ids, 41, 8, 16)
    assert_close(case.run("triton"), case.expected(), case.limit("triton", device))


def test_choices_come_in_one_part_or_two() -> None:
    found = {choices: few.parts_of(choices) for choices in (1, 2, 3, 7, 8, 10, 11, 12, 13, 16, 17)}
    assert found == {
        1: (1, 0), 2: (2, 0), 3: (2, 1), 7: (8, 0), 8: (8, 0), 10: (8, 2), 11: (8, 4), 12: (8, 4), 13: (16, 0),
        16: (16, 0), 17: (16, 1),
    }  # fmt: skip


def test_a_program_holds_as_many_rows_as_fit() -> None:
    """Four of the published sizes, with more warps in bf16; fewer where rows are longer or wider, or blocks lower."""
    gate_up, down = 2 * 2048, 12 * 512
    assert few._rows(gate_up, 1, 128) == few._rows(gate_up, 2, 128) == few._rows(down, 1, 128) == (4, 4)
    assert few._rows(down, 2, 128) == (4, 8)
    assert (few._rows(gate_up, 4, 128), few._rows(down, 4, 128), few._rows(12 * 8192, 4, 128)) == (
        (4, 8),
        (2, 8),
        (1, 8),
    )
    assert few._rows(64, 1, 2) == (2, 4)
