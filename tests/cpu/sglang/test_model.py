"""The model and its drafter, built and loaded by SGLang's own loader, against the oracle; alone and over two ranks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.reference import ReferenceModel
from tests.helpers import relative_error

pytest.importorskip("sglang")

from .in_process import load, run, spawn, start  # noqa: E402

SEQUENCES = [[5, 6, 7, 8, 9], [1], list(range(90)), [3, 3, 3]]
SHAPES: dict[str, dict[str, Any]] = {
    "ratio1": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "ratio2": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "ratio4": {"linear_num_key_heads": 2, "linear_num_value_heads": 8},
    "one KV head, dense layer, tied": {
        "num_key_value_heads": 1,
        "mlp_only_layers": [1],
        "tie_word_embeddings": True,
    },
    "YaRN": {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}},
}
# float32 against float64, so far below what any wrong weight, head or gate would do.
TOLERANCE = 1e-5


def checkpoint(directory: Path, name: str, **changes: Any) -> Path:
    return write_random_checkpoint(
        directory / name.replace(" ", ""), "tiny", dtype="float32", **SHAPES[name], **changes
    )


def oracle(path: Path) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(path, torch.float64)


def errors(hidden: Sequence[torch.Tensor], path: Path) -> list[float]:
    """Relative errors of the target's hidden states, one a sequence."""
    model = oracle(path)
    return [relative_error(x, model.hidden(model.tokens(s))[0]) for x, s in zip(hidden, SEQUENCES, strict=True)]


@pytest.mark.parametrize("name", SHAPES)
def test_hidden_states_and_logits_are_the_oracles(name: str, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, name)
    start(path, meeting=tmp_path / "meeting")
    model = load(path)
    hidden = run(model, SEQUENCES)
    assert max(errors(hidden, path)) < TOLERANCE
    reference = oracle(path)
    logits = hidden[0] @ model.lm_head.weight[: model.spec.vocab_size].T
    assert relative_error(logits, reference(reference.tokens(SEQUENCES[0]))[0]) < TOLERANCE


def test_the_drafter_says_what_the_oracles_mtp_layer_says(tmp_path: Path) -> None:
    path = checkpoint(tmp_path, "ratio2")
    start(path, meeting=tmp_path / "meeting")
    target, drafter = load(path), load(path, drafter=True)
    drafter.set_embed_and_head(*target.get_embed_and_head())
    assert drafter.model.embed_tokens.weight is target.model.embed_tokens.weight
    assert drafter.lm_head.weight is target.lm_head.weight
    hidden = run(target, SEQUENCES)
    following = [[*sequence[1:], 11] for sequence in SEQUENCES]
    drafted = run(drafter, following, torch.cat(hidden))
    model = oracle(path)
    for x, sequence, after in zip(drafted, SEQUENCES, following, strict=True):
        expected = model.mtp(model.hidden(model.tokens(sequence)), model.tokens(after))[0]
        assert relative_error(x, expected) < TOLERANCE


def _rank(rank: int, path: str, meeting: str, expert_parallel: bool, results: str) -> None:
    arguments = {"ep_size": 2} if expert_parallel else {}
    start(Path(path), rank=rank, size=2, meeting=Path(meeting), **arguments)
    model = load(Path(path))
    experts = next(m for m in model.modules() if hasattr(m, "w13"))
    torch.save((run(model, SEQUENCES), tuple(experts.w13.shape)), f"{results}.{rank}")


@pytest.mark.parametrize(
    ("name", "expert_parallel"), [("ratio4", False), ("one KV head, dense layer, tied", False), ("ratio1", True)]
)
def test_two_ranks_say_what_one_says(name: str, expert_parallel: bool, tmp_path: Path) -> None:
    path = checkpoint(tmp_path, name)
    spawn(_rank, 2, str(path), str(tmp_path / "meeting"), expert_parallel, str(tmp_path / "result"))
    spec = oracle(path).spec
    experts, rows = spec.moe.num_experts, 2 * spec.moe.intermediate_size
    for rank in range(2):
        hidden, shape = torch.load(f"{tmp_path / 'result'}.{rank}")
        assert shape[:2] == ((experts // 2, rows) if expert_parallel else (experts, rows // 2))
        assert max(errors(hidden, path)) < TOLERANCE
