"""The model and its drafter, built and loaded by SGLang's own loader, against the oracle; alone and over two ranks."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.sglang_integration.model import Qwen3NextModel
from qwen3next_plugin.sglang_integration.mtp import Qwen3NextPredictor
from tests.helpers import relative_error

from .in_process import load, run, spawn, start

SEQUENCES = [[5, 6, 7, 8, 9], [1], list(range(90)), [3, 3, 3]]
SHAPES: dict[str, dict[str, Any]] = {
    "ratio1": {"linear_num_key_heads": 4, "linear_num_value_heads": 4},
    "ratio2": {"linear_num_key_heads": 2, "linear_num_value_heads": 4},
    "ratio4": {"linear_num_key_heads": 2, "linear_num_value_heads": 8},
    "dense-tied-one-KV-head": {
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


def test_bodies_have_the_arguments_of_a_captured_prefill() -> None:
    """SGLang's segment-captured prefill calls them so, and looks the last one up by its name."""
    for body in (Qwen3NextModel, Qwen3NextPredictor):
        names = list(inspect.signature(body.forward).parameters)
        assert names == ["self", "input_ids", "positions", "forward_batch", "input_embeds"]


# One pair of processes for all of them: SGLang takes long to import.
ON_TWO_RANKS = {
    "ratio4": {},
    "dense-tied-one-KV-head": {},
    "ratio1": {"ep_size": 2},
}


def _rank(rank: int, directory: str) -> None:
    results = {}
    for name, arguments in ON_TWO_RANKS.items():
        path = Path(directory) / name
        start(path, rank=rank, size=2, meeting=Path(directory) / f"meeting-{name}", **arguments)
        model = load(path)
        experts = next(module for module in model.modules() if hasattr(module, "w13"))
        results[name] = (run(model, SEQUENCES), tuple(experts.w13.shape))
    torch.save(results, f"{directory}/result.{rank}")


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a checkpoint a case, and in result.0 and result.1 what each rank found."""
    directory = tmp_path_factory.mktemp("two_ranks")
    for name in ON_TWO_RANKS:
        checkpoint(directory, name)
    spawn(_rank, 2, str(directory))
    return directory


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("name", ON_TWO_RANKS)
def test_two_ranks_say_what_one_says(name: str, rank: int, two_ranks: Path) -> None:
    path = two_ranks / name
    hidden, shape = torch.load(two_ranks / f"result.{rank}")[name]
    moe = load_spec(path).moe
    experts, rows = moe.num_experts, 2 * moe.intermediate_size
    assert shape[:2] == ((experts // 2, rows) if "ep_size" in ON_TWO_RANKS[name] else (experts + 1, rows // 2))
    assert max(errors(hidden, path)) < TOLERANCE
