"""The choice of experts."""

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops.experts import topk_softmax_cpu

from tests.helpers import relative_error


@pytest.mark.parametrize("renormalize", [False, True])
def test_the_largest_of_a_softmax(renormalize: bool) -> None:
    logits = torch.randn(7, 16).bfloat16()
    weights, experts = topk_softmax_cpu(torch.empty(7, 4), logits, 3, renormalize)
    chance = logits.double().softmax(-1)
    expected, ids = chance.topk(3, dim=-1)
    expected = expected / expected.sum(-1, keepdim=True) if renormalize else expected
    assert relative_error(weights, expected) < 1e-6
    assert experts.dtype is torch.int32 and torch.equal(chance.gather(1, experts.long()), chance.gather(1, ids))


def test_a_correction_bias_is_refused() -> None:
    with pytest.raises(NotImplementedError, match="correction bias"):
        topk_softmax_cpu(torch.empty(1, 4), torch.empty(1, 4), 1, True, torch.zeros(4))
