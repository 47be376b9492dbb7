"""How a server starts: under the model's literal name, on two ranks, or as the stock engine when that is asked for."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from qwen3next_plugin.demo.random import write_random_checkpoint

from .oracle import LOGPROB_TOLERANCE, golden_prompts, largest_error
from .requests import complete, complete_together
from .server import Server, engine, flags

NAME = "Qwen/Qwen3-Next-80B-A3B-Instruct"


@pytest.mark.quick
def test_the_literal_name_is_found_in_the_hub_cache(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """`vllm serve Qwen/Qwen3-Next-80B-A3B-Instruct` or its like, offline: the name leads to our model."""
    checkpoint = random_checkpoint("ratio2")
    repository = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    revision = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree(checkpoint, repository / "snapshots" / revision)
    environment = {"HF_HOME": str(tmp_path), "HF_HUB_CACHE": str(tmp_path / "hub")}
    with Server(NAME, *flags(), env=environment, name="literal-name") as server:
        assert NAME in [model.id for model in server.client.models.list().data]
        (line,) = server.activation_lines()
        assert "active" in line
        (golden,) = golden_prompts(checkpoint, (50,), 20)
        assert complete(server, golden.prompt, 20).tokens == list(golden.answer)


def test_two_ranks_answer_as_one(random_checkpoint: Callable[[str], Path]) -> None:
    """Tensor parallelism over two processes, with drafts and the prefix cache."""
    checkpoint = random_checkpoint("ratio2")
    more, environment = engine().two_ranks()
    with Server(checkpoint, *flags(2, cache=True), *more, env=environment, name="two-ranks") as server:
        assert len(server.activation_lines()) == 2
        golden = golden_prompts(checkpoint, (100, 70, 33, 5), 40)
        for _ in range(2):
            for expected, found in zip(golden, complete_together(server, [g.prompt for g in golden], 40), strict=True):
                assert found.tokens == list(expected.answer)
                assert largest_error(checkpoint, expected.prompt, found) < LOGPROB_TOLERANCE
        assert found.cached_tokens == 0  # five tokens
        assert complete(server, golden[0].prompt, 1).cached_tokens > 0


@pytest.mark.quick
def test_switched_off_it_is_the_stock_engine(tmp_path: Path) -> None:
    """QWEN3NEXT_PLUGIN=0: the engine's own Gated DeltaNet layer runs, and the log does not say otherwise."""
    # vLLM's own layer needs bfloat16 and heads of 128 on a CPU.
    checkpoint = write_random_checkpoint(tmp_path, "tiny", linear_key_head_dim=128, linear_value_head_dim=128)
    environment = {"QWEN3NEXT_PLUGIN": "0"}
    with Server(checkpoint, *flags(dtype="bfloat16"), env=environment, name="stock") as server:
        assert len(complete(server, range(20), 5).tokens) == 5
        assert server.activation_lines() == []
        assert engine().stock_sign in server.log
        said = [line for line in server.log.splitlines() if "qwen3next-plugin" in line.replace(str(tmp_path), "")]
        assert [line for line in said if "stock" not in line] == []
