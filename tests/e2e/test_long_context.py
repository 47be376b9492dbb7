"""The demo model at four times the length it was made for: YaRN in each of an engine's ways, beside the oracle's."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from qwen3next_plugin.demo.command import copy_shipped
from qwen3next_plugin.reference import ReferenceCache
from qwen3next_plugin.rope_request import RopeShortcut, complete_rope

from .engine import Completion, RefusedError
from .oracle import LOGPROB_TOLERANCE, oracle
from .requests import complete
from .server import Server, engine, flags

FACTOR = 4
TRAINED = 4096
ANSWER = 24
DRAFTS = 2
ORACLE_CHUNK = 512  # the oracle's attention scores of 16384 tokens at once would be 8 GiB a tensor

YARN = {"rope_type": "yarn", "factor": float(FACTOR), "original_max_position_embeddings": TRAINED}
WAYS: dict[str, tuple[list[str], dict[str, str]]] = {
    "shortcut": ([], {"QWEN3NEXT_ROPE": f"yarn:{FACTOR}"}),
    "overrides": (engine().override({"rope_scaling": YARN}), {}),
}


SECOND = [pytest.mark.quick, pytest.mark.further] if engine().name == "sglang" else []
"""SGLang's two versions share the ways."""


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The demo model as it is shipped, and for the oracle the same with the whole rope dict in its config.json."""
    shipped, extended = (tmp_path_factory.mktemp("long") / name for name in ("shipped", "extended"))
    copy_shipped(shipped)
    shutil.copytree(shipped, extended)
    config = json.loads((shipped / "config.json").read_text())
    assert config["max_position_embeddings"] == TRAINED
    config["rope_parameters"] = complete_rope(config, shortcut=RopeShortcut(FACTOR)).parameters
    config["max_position_embeddings"] = FACTOR * TRAINED
    (extended / "config.json").write_text(json.dumps(config))
    return shipped, extended


@pytest.fixture(scope="module", params=["shortcut", pytest.param("overrides", marks=SECOND)])
def server(request: pytest.FixtureRequest, checkpoints: tuple[Path, Path]) -> Iterator[Server]:
    more, env = WAYS[request.param]
    arguments = [*flags(num_drafts=DRAFTS, max_model_len=FACTOR * TRAINED), *more]
    with Server(checkpoints[0], *arguments, env=env, name=f"long-{request.param}") as started:
        yield started


@lru_cache(maxsize=4)
@torch.no_grad()
def last_logprobs(checkpoint: Path, tokens: tuple[int, ...], count: int) -> torch.Tensor:
    """The oracle's log-probabilities [count, vocab] of what follows each of the last `count` tokens."""
    cache = ReferenceCache()
    rows: list[torch.Tensor] = []
    for chunk in torch.tensor([tokens]).split(ORACLE_CHUNK, dim=1):
        rows = [*rows[-1:], oracle(checkpoint)(chunk, cache)[0]]
    return torch.cat(rows)[-count:].log_softmax(-1)


def largest_difference(checkpoint: Path, prompt: list[int], found: Completion) -> float:
    """Between the engine's and the oracle's log-probabilities, over all that the engine reported."""
    assert len(found.tokens) == len(found.top_logprobs) == ANSWER
    rows = last_logprobs(checkpoint, (*prompt, *found.tokens[:-1]), ANSWER)
    return max(
        abs(float(row[token]) - logprob)
        for row, top in zip(rows, found.top_logprobs, strict=True)
        for token, logprob in top.items()
    )


def conversation(checkpoint: Path, length: int) -> list[int]:
    """The last `length` tokens of a conversation long enough."""
    facts = [f"My friend {name} lives in {place}." for name, place in (("Ada", "Oslo"), ("Leo", "Rome"))]
    messages: list[dict[str, str]] = []
    for turn in range(length // 16):
        messages.append({"role": "user", "content": facts[turn % 2]})
        messages.append({"role": "assistant", "content": "I will remember that."})
    messages.append({"role": "user", "content": "Where does Leo live?"})
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokens: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert len(tokens) >= length
    return tokens[-length:]


def test_tokens_beyond_the_trained_length_are_scored_as_by_the_oracle(
    server: Server, checkpoints: tuple[Path, Path]
) -> None:
    """The last that fit, where the first way is served; just behind the trained length, where the second is."""
    longest = FACTOR * TRAINED - engine().context_reserve(DRAFTS) - ANSWER
    prompt = conversation(checkpoints[0], longest if "shortcut" in server.name else TRAINED + 100)
    found = complete(server, prompt, ANSWER)
    assert largest_difference(checkpoints[1], prompt, found) < LOGPROB_TOLERANCE


def test_short_prompts_are_scored_with_the_same_rope(server: Server, checkpoints: tuple[Path, Path]) -> None:
    """And the oracle without YaRN is far off, so that agreement means something."""
    shipped, extended = checkpoints
    prompt = conversation(shipped, 700)
    found = complete(server, prompt, ANSWER)
    assert largest_difference(extended, prompt, found) < LOGPROB_TOLERANCE
    assert largest_difference(shipped, prompt, found) > 10 * LOGPROB_TOLERANCE


def test_a_prompt_that_leaves_no_room_is_refused(server: Server, checkpoints: tuple[Path, Path]) -> None:
    with pytest.raises(RefusedError):
        complete(server, conversation(checkpoints[0], FACTOR * TRAINED), 1)
    server.assert_alive()
