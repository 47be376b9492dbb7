"""A real server with random weights, for each ratio of value heads to key heads, laid beside the oracle.

In random weights nothing hides: log-probabilities come near the oracle's only if every layer, state and copy is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from .oracle import (
    LOGPROB_TOLERANCE,
    TIE_MARGIN,
    golden_prompts,
    largest_error,
    largest_prompt_error,
    largest_regret,
    random_prompt,
)
from .requests import complete, complete_together
from .server import Server, flags

LENGTHS = (3, 17, 33, 64, 65, 90, 128, 150)


@dataclass(frozen=True)
class Setup:
    shape: str
    num_drafts: int
    cache: bool
    eager: bool = True

    def __str__(self) -> str:
        return f"{self.shape}-mtp{self.num_drafts}" + "-cached" * self.cache + "-compiled" * (not self.eager)


@dataclass
class Served:
    """A server beside the checkpoint it serves."""

    server: Server
    checkpoint: Path
    setup: Setup


@pytest.fixture(
    scope="module",
    params=[Setup("ratio2", 0, False, eager=False), Setup("ratio1", 1, True), Setup("ratio4", 3, True)],
    ids=str,
)
def served(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Iterator[Served]:
    setup: Setup = request.param
    checkpoint = random_checkpoint(setup.shape)
    with Server(checkpoint, *flags(setup.num_drafts, setup.cache, eager=setup.eager), name=str(setup)) as server:
        yield Served(server, checkpoint, setup)


def test_the_plugin_says_once_that_it_is_active(served: Served) -> None:
    (line,) = served.server.activation_lines()
    assert "vllm 0." in line and "torch 2." in line


def test_greedy_answers_and_log_probabilities_are_the_oracles(served: Served) -> None:
    for golden in golden_prompts(served.checkpoint, LENGTHS, 40):
        found = complete(served.server, golden.prompt, 40)
        assert found.tokens == list(golden.answer), f"after a prompt of {len(golden.prompt)} tokens"
        assert found.finish_reason == "length"
        assert largest_error(served.checkpoint, golden.prompt, found) < LOGPROB_TOLERANCE


def test_eight_at_once_answer_as_alone(served: Served) -> None:
    golden = golden_prompts(served.checkpoint, LENGTHS, 40)
    for expected, found in zip(golden, complete_together(served.server, [g.prompt for g in golden], 40), strict=True):
        assert found.tokens == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"
        assert largest_error(served.checkpoint, expected.prompt, found) < LOGPROB_TOLERANCE


def test_a_conversation_goes_on_from_the_cache(served: Served) -> None:
    """Every turn is the last one and its answer and a new question; generated twice, so that a hit follows a hit."""
    prompt = random_prompt(7, 200)  # with drafts vLLM leaves out the last full block, which may have 64 tokens
    cached = 0
    for turn in range(4):
        found = complete(served.server, prompt, 50)
        again = complete(served.server, prompt, 50)
        cached += found.cached_tokens
        for answer in (found, again):
            assert largest_regret(served.checkpoint, prompt, answer.tokens) < TIE_MARGIN
            assert largest_error(served.checkpoint, prompt, answer) < LOGPROB_TOLERANCE
        if served.setup.cache:
            assert again.cached_tokens > 0
        prompt = (*prompt, *found.tokens, *random_prompt(turn, 9))
    assert (cached > 0) == served.setup.cache


def test_generated_tokens_score_the_same_as_one_prefill(served: Served) -> None:
    """Engine against itself: log-probabilities while generating, then of the same tokens as one uncached prompt."""
    prompt = random_prompt(11, 80)
    generated = complete(served.server, prompt, 120)
    assert largest_error(served.checkpoint, prompt, generated) < LOGPROB_TOLERANCE
    whole = [*prompt, *generated.tokens]
    scored = complete(served.server, whole, 1, score_prompt=True)
    assert scored.cached_tokens == 0
    assert largest_prompt_error(served.checkpoint, whole, scored) < LOGPROB_TOLERANCE
    for place, (token, logprob) in enumerate(zip(generated.tokens, generated.logprobs, strict=True)):
        assert abs(scored.prompt_logprobs[len(prompt) + place - 1][token] - logprob) < LOGPROB_TOLERANCE


def test_sampling_with_a_temperature_is_scored_rightly(served: Served) -> None:
    """Sampled tokens lead where greedy ones never go, and drafts are kept or thrown away by the rejection rule."""
    prompt = random_prompt(13, 40)
    found = complete(served.server, prompt, 80, temperature=1.0, seed=5)
    assert len(set(found.tokens)) > 10
    assert largest_error(served.checkpoint, prompt, found) < LOGPROB_TOLERANCE


def test_chat_and_streaming(served: Served) -> None:
    messages: list[Any] = [{"role": "user", "content": "My name is Ada. What is my name?"}]
    extra = {"return_token_ids": True, "ignore_eos": True}
    create = served.server.client.chat.completions.create
    whole = create(model=served.server.model, messages=messages, max_tokens=24, temperature=0, extra_body=extra)
    content = whole.model_dump()
    prompt, tokens = content["prompt_token_ids"], content["choices"][0]["token_ids"]
    assert len(tokens) == 24
    assert largest_regret(served.checkpoint, prompt, tokens) < TIE_MARGIN

    pieces: list[str] = []
    streamed: list[int] = []
    for chunk in create(
        model=served.server.model, messages=messages, max_tokens=24, temperature=0, extra_body=extra, stream=True
    ):
        for choice in chunk.model_dump()["choices"]:
            pieces.append(choice["delta"].get("content") or "")
            streamed += choice.get("token_ids") or []
    assert streamed == tokens
    assert "".join(pieces) == whole.choices[0].message.content
    assert sum(map(bool, pieces)) > 1


def test_nothing_died(served: Served) -> None:
    complete(served.server, random_prompt(17, 20), 10)
    served.server.assert_alive()
    assert "Traceback" not in served.server.log
    drafted, _ = served.server.acceptance()
    assert (drafted > 0) == (served.setup.num_drafts > 0)
