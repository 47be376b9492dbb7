"""What a verification of drafts and a commit refuse, and what they say."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import gdn

from .draft_case import Case
from .layer_case import EPS, make_layer
from .slots import ints, ranges


def arguments(device: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Good arguments of a verification and of a commit, by name."""
    case = Case([make_layer(4, device)], [(0, 2, 1), (2, 4, 0)], None, length=2)
    names = ("mixed_qkv", "z", "a", "b", "conv_weight", "A_log", "dt_bias", "norm_weight")
    verify = dict(zip(names, case.layers[0].arguments(), strict=True)) | {
        "conv_state": case.windows[0],
        "ssm_state": case.states[0],
        "record": case.records.layer(0),
        "num_k_heads": 1,
        "norm_eps": EPS,
        **ranges(case.rows, device),
        "max_query_len": 2,
        "state_slots": ints([1, 0], device),
        "out": case.layers[0].tokens.out(),
    }
    states = {"conv_state": case.windows, "ssm_state": case.states, "records": case.records}
    return verify, states | {"state_slots": ints([1, 0], device), "last_tokens": ints([1, 0], device)}


def other_records(**sizes: Any) -> gdn.DraftRecords:
    given: dict[str, Any] = {"num_k_heads": 1, "num_v_heads": 2, "head_k_dim": 16, "head_v_dim": 8}
    return gdn.DraftRecords.allocate(1, 2, 2, **(given | sizes), input_dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_query_len": 3}, "max_query_len is 3, but record has room for 2 tokens a row"),
        ({"record": other_records()}, r"record.inputs has shape \(1, 2, 2, 48\); \[rows, tokens a row, conv_dim\]"),
        ({"record": other_records(head_v_dim=4).layer(0)}, r"record.inputs has shape \(2, 2, 40\); \(2, 2, 48\)"),
        ({"state_slots": torch.zeros(1).int()}, r"state_slots has shape \(1,\); \(2,\) is needed"),
        ({"conv_state": torch.zeros(3, 48, 2)}, r"conv_state has shape \(3, 48, 2\): width 4 needs at least 3 columns"),
    ],
)
def test_bad_arguments_of_a_verification_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn.gdn_verify_fused(**(arguments("cpu")[0] | change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"last_tokens": torch.zeros(2)}, "last_tokens is torch.float32"),
        ({"snapshot_slots": torch.zeros(2).int()}, "snapshot_tokens is None, but snapshot_slots, snapshot_tokens come"),
        ({"records": other_records(num_v_heads=4)}, r"record.inputs has shape \(1, 2, 2, 64\); \(1, 2, 2, 48\)"),
        ({"records": other_records(num_k_heads=3)}, "3 key heads, but the 2 value heads"),
        ({"conv_state": torch.zeros(1, 3, 40, 3)}, r"conv_state has shape \(1, 3, 40, 3\); \(1, 3, 48, 3\)"),
        ({"state_slots": torch.zeros(2, 1).int()}, r"state_slots has shape \(2, 1\); \[rows\]"),
    ],
)
def test_bad_arguments_of_a_commit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gdn.gdn_commit(**(arguments("cpu")[1] | change))
