"""The down product of short FP8 rows, whose programs walk over their expert's columns."""

import pytest
import torch

from qwen3next_plugin.kernels.moe.triton import experts as experts_module
from qwen3next_plugin.kernels.moe.triton import walking

from .common import assert_close, assert_repeatable
from .moe_case import Problem, problem, random_ids

pytestmark = pytest.mark.usefixtures("poisoned_memory")
HIDDEN = 512


def shapes_walked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """The shapes of the weights that are walked over from now on."""
    seen: list[tuple[int, ...]] = []
    run = walking.walking_product

    def noted(a: torch.Tensor, weight: torch.Tensor, *rest: object) -> None:
        seen.append(tuple(weight.shape))
        run(a, weight, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(experts_module, "walking_product", noted)
    return seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("inner, block", [(32, 128), (64, 128), (64, 64), (128, 128)])
def test_short_rows(inner: int, block: int, dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Spread, all on one expert, some skipped, and none at all; once as few tokens, once as several tiles an expert."""
    seen = shapes_walked(monkeypatch)
    for tokens in (3, 40):
        ids = random_ids(tokens, 4, 2, device)
        kept = problem(ids, 4, HIDDEN, inner, "fp8 activations", dtype, block)
        x, w13, w2, router, _, *scales = kept.tensors
        skewed, skipped = torch.full_like(ids, 3), torch.where(ids % 3 == 0, -1, ids)
        skipped[0, :] = -1
        for chosen in (ids, skewed, skipped, torch.full_like(ids, -1)):
            case = Problem((x, w13, w2, router, chosen, *scales), True)
            assert_close(case.run("triton"), case.expected(), case.limit("triton", device))
        assert_repeatable(case.run, "triton")
    assert set(seen) == {(4, HIDDEN, inner)}


@pytest.mark.parametrize(
    "inner, weights, hidden, block",
    [
        (256, "fp8 activations", HIDDEN, 128),  # long rows
        (96, "fp8 activations", HIDDEN, 128),  # not a power of two
        (128, "fp8", HIDDEN, 128),  # activations kept
        (128, "float", HIDDEN, 128),
        (128, "fp8 activations", 384, 128),  # columns that four programs do not share evenly
        (128, "fp8 activations", HIDDEN, 64),  # two factors a group of inputs
    ],
)
def test_others_go_another_way(
    inner: int, weights: str, hidden: int, block: int, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = shapes_walked(monkeypatch)
    case = problem(random_ids(20, 3, 2, device), 3, hidden, inner, weights, torch.bfloat16, block)
    assert_close(case.run("triton"), case.expected(), case.limit("triton", device))
    assert not seen


def test_the_bits_of_the_other_product(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs are rounded alike and multiplied by the same factors, so that a file's tiles decide nothing but time."""
    case = problem(random_ids(40, 4, 2, device), 4, HIDDEN, 128, "fp8 activations", torch.bfloat16)
    found = case.run("triton")
    monkeypatch.setattr(experts_module, "walks", lambda *_: False)
    assert torch.equal(found, case.run("triton"))
