"""Copies of recurrent states: against SGLang's own Triton kernels, in Triton's interpreter."""

from typing import Any

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops import states
from torch import Tensor

kernels: Any = pytest.importorskip("sglang.kernels.ops.mamba.mamba_state_scatter_triton")

LAYERS, SLOTS, ROWS, DRAFTS = 2, 7, 4, 3
CONV, SSM = (6, 3), (2, 4, 5)


class TakenForCuda(Tensor):
    """The kernels' wrappers refuse what does not say that it is on a GPU; the interpreter does not mind."""

    is_cuda = True  # type: ignore[assignment]


def pools(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    return torch.randn(LAYERS, SLOTS, *CONV).to(dtype), torch.randn(LAYERS, SLOTS, *SSM)


@pytest.mark.parametrize("all_layers", [False, True])
def test_tracking(all_layers: bool) -> None:
    mask = torch.tensor([True, False, True, True])
    source, target = torch.tensor([0, 1, 2, 3], dtype=torch.int32), torch.tensor([4, 5, 6, 1])
    conv, ssm = pools()
    expected = (conv.clone(), ssm.clone())
    name = "track_mamba_states_all_layers" if all_layers else "track_mamba_states_if_needed"
    mine = (conv, ssm) if all_layers else (conv[1], ssm[1])
    theirs = expected if all_layers else (expected[0][1], expected[1][1])
    getattr(kernels, name)(*theirs, source, mask, target, ROWS)
    getattr(states, name)(*mine, source, mask, target, ROWS)
    assert torch.equal(conv, expected[0]) and torch.equal(ssm, expected[1])
    assert torch.equal(ssm[1, 4], ssm[1, 0]) and not torch.equal(ssm[1, 5], ssm[1, 1])


def test_freed_slots_are_left_alone() -> None:
    conv, ssm = pools()
    before = (conv.clone(), ssm.clone())
    source, target = torch.tensor([-1, 2]), torch.tensor([4, -1])
    states.track_mamba_states_all_layers(conv, ssm, source, torch.tensor([True, True]), target, 2, True)
    assert torch.equal(conv, before[0]) and torch.equal(ssm, before[1])


@pytest.mark.parametrize("kernel", ["fused_mamba_state_scatter_with_mask", "fused_conv_window_scatter_with_mask"])
def test_commit(kernel: str) -> None:
    shape = SSM if "mamba" in kernel else CONV
    pool, drafts = torch.randn(LAYERS, SLOTS, *shape), torch.randn(LAYERS, ROWS, DRAFTS, *shape)
    slots = torch.tensor([5, 0, 3, 2], dtype=torch.int32)
    steps = torch.tensor([2, -1, 0, 1])
    expected = pool.clone()
    given = [t.as_subclass(TakenForCuda) for t in (expected, drafts, slots, steps)]
    getattr(kernels, kernel)(*given)
    untouched = pool[:, 0].clone()
    states.scatter_with_mask(pool, drafts, slots, steps)
    assert torch.equal(pool, expected)
    assert torch.equal(pool[:, 5], drafts[:, 0, 2]) and torch.equal(pool[:, 0], untouched)


def test_commit_from_named_rows() -> None:
    pool, drafts = torch.zeros(1, 3, 2), torch.randn(1, 4, 2, 2)
    states.scatter_with_mask(pool, drafts, torch.tensor([1, -1]), torch.tensor([1, 0]), torch.tensor([3, 0]))
    assert torch.equal(pool[0, 1], drafts[0, 3, 1]) and not pool[0, [0, 2]].any()


@pytest.mark.parametrize("tracked", [False, True])
def test_which_token_counts(tracked: bool) -> None:
    length, interval = 4, 4
    lens = torch.tensor([1, 2, 3, 4] * 4)
    rows = len(lens)
    index = torch.full((rows, length), -1)
    for row, accepted in enumerate(lens.tolist()):
        index[row, :accepted] = row * length + torch.arange(accepted)
    before = torch.arange(rows) // 4 + 5 if tracked else None
    expected = kernels.fused_commit_track_indices(index, lens, before, length, interval)
    last, snapshot = states.fused_commit_track_indices(index, lens, before, length, interval)
    assert torch.equal(last, expected[0]) and torch.equal(last, lens - 1)
    if before is None:
        assert snapshot is None and expected[1] is None
    else:
        assert snapshot is not None and torch.equal(snapshot, expected[1])
        # 7 tokens and 2 more pass 8: the state after the first of them is the one at 8.
        assert snapshot[9] == 0 and snapshot[0] == -1


def test_several_at_once_are_left_to_the_single_form() -> None:
    assert states.no_multi_scatter([(torch.zeros(1), torch.zeros(1))]) is False
