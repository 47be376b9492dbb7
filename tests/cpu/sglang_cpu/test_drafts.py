"""Draft chains: against the plainest Python that says what must come out, and SGLang's own kernel where it has one."""

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops import drafts
from torch import Tensor

from tests.helpers import nan_like


def built(rows: int, length: int, seq_lens: Tensor) -> dict[str, Tensor]:
    poison = {
        "positions": nan_like(rows * length, dtype=torch.int64),
        "retrieve_index": nan_like(rows, length, dtype=torch.int64),
        "retrieve_next_token": nan_like(rows, length, dtype=torch.int64),
        "retrieve_next_sibling": nan_like(rows, length, dtype=torch.int64),
        "tree_mask": torch.zeros(rows * length * length, dtype=torch.bool),
    }
    empty = torch.empty(rows, 0, dtype=torch.int64)
    drafts.build_tree_kernel_efficient_cpu(
        empty, empty, seq_lens, **poison, topk=1, depth=length - 1, draft_token_num=length, mode=1
    )
    return poison


def test_a_chain_counts_on_from_its_sequence() -> None:
    got = built(2, 3, torch.tensor([5, 9]))
    assert got["positions"].tolist() == [5, 6, 7, 9, 10, 11]
    assert got["retrieve_index"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert got["retrieve_next_token"].tolist() == [[1, 2, -1]] * 2
    assert got["retrieve_next_sibling"].tolist() == [[-1, -1, -1]] * 2
    causal = [[True, False, False], [True, True, False], [True, True, True]]
    assert got["tree_mask"].view(2, 3, 3).tolist() == [causal, causal]


def test_a_tree_is_refused() -> None:
    empty = torch.empty(0, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="only chains"):
        drafts.build_tree_kernel_efficient_cpu(*[empty] * 8, topk=2, depth=1, draft_token_num=2, mode=1)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_chain_is_accepted_as_far_as_the_model_agrees(length: int) -> None:
    rows, said = 64, torch.randint(2, (64, length))
    candidates = torch.randint(2, (rows, length))
    chain = built(rows, length, torch.zeros(rows, dtype=torch.int64))
    predicts = torch.full((rows * length,), -7)
    index = torch.full((rows, length), -1)
    count = nan_like(rows, dtype=torch.int64)
    order = (chain["retrieve_index"], chain["retrieve_next_token"], chain["retrieve_next_sibling"])
    drafts.verify_tree_greedy_cpu(predicts, index, count, candidates, *order, said.view(-1))
    for row in range(rows):
        agreed = 0
        while agreed + 1 < length and candidates[row, agreed + 1] == said[row, agreed]:
            agreed += 1
        assert count[row] == agreed
        numbers = [row * length + at for at in range(agreed + 1)]
        assert index[row].tolist() == numbers + [-1] * (length - agreed - 1)
        assert predicts[row * length :][: agreed + 1].tolist() == said[row, : agreed + 1].tolist()


def test_slots_behind_each_sequence() -> None:
    table = torch.arange(40).view(4, 10)
    out = nan_like(6, dtype=torch.int64)
    drafts.assign_draft_cache_locs_contiguous_cpu(torch.tensor([2, 0]), table, torch.tensor([4, 1]), out, 10, 1, 3)
    assert out.tolist() == [24, 25, 26, 1, 2, 3]


def test_the_bonus_token_is_the_last_accepted_one() -> None:
    bonus = nan_like(2, dtype=torch.int32)
    drafts.fill_bonus_tokens_cpu(torch.tensor([7, 8, 9, 4, 5, 6]), torch.tensor([1, 3]), bonus, 3)
    assert bonus.tolist() == [7, 6]


def test_slots_of_accepted_tokens_move_to_the_front() -> None:
    out = torch.full((6,), -9)
    drafts.fill_accept_out_cache_loc_cpu(
        torch.tensor([[0, 1, -1], [3, -1, -1]]), torch.tensor([10, 11, 12, 13, 14, 15]), out
    )
    assert out.tolist() == [10, 11, 13, -9, -9, -9]


def test_chains_are_those_of_sglangs_triton_kernel() -> None:
    """0.5.20 has the same in Triton, for another kind of GPU, with the verified part in its mask."""
    utils = pytest.importorskip("sglang.srt.speculative.eagle_utils")
    kernel = getattr(utils, "sgl_build_tree_kernel_triton", None)
    if kernel is None:
        pytest.skip("this SGLang has no Triton version")
    rows, length, lens = 2, 4, torch.tensor([5, 9])
    got = built(rows, length, lens)
    own = [nan_like(t) for t in (got["positions"], got["retrieve_index"])]
    own += [torch.full_like(got["retrieve_next_token"], -1), torch.full_like(got["retrieve_next_sibling"], -1)]
    mask = torch.ones(int(lens.sum()) * length + rows * length * length, dtype=torch.bool)
    parents = torch.tensor([[-1, 0, 1]] * rows)
    kernel(parents, torch.arange(3).repeat(rows, 1), lens, mask, *own, 1, 3, length, utils.TreeMaskMode.FULL_MASK)
    names = ("positions", "retrieve_index", "retrieve_next_token", "retrieve_next_sibling")
    assert all(torch.equal(got[name], mine) for name, mine in zip(names, own, strict=True))
