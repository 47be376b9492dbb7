"""A real server with random weights, for each ratio of value heads to key heads, laid beside the oracle.

In random weights nothing hides: log-probabilities come near the oracle's only if every layer, state and copy is right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import httpx
import pytest

from .engine import Setup
from .oracle import (
    LOGPROB_TOLERANCE,
    TIE_MARGIN,
    golden_prompts,
    largest_error,
    largest_prompt_error,
    largest_regret,
    random_prompt,
)
from .requests import chat, complete, complete_together
from .server import Server, engine, parameters

LENGTHS = (3, 17, 33, 64, 65, 90, 128, 150)


@dataclass
class Served:
    """A server beside the checkpoint it serves."""

    server: Server
    checkpoint: Path
    setup: Setup


@pytest.fixture(scope="module", params=parameters(engine().random_setups))
def served(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Iterator[Served]:
    setup: Setup = request.param
    checkpoint = random_checkpoint(setup.shape)
    with Server(checkpoint, *engine().flags(setup), name=str(setup)) as server:
        yield Served(server, checkpoint, setup)


def test_the_plugin_says_once_that_it_is_active(served: Served) -> None:
    (line,) = served.server.activation_lines()
    assert f"{engine().name} 0." in line and "torch 2." in line


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
    assert (cached > 0) == bool(served.setup.cache)


def test_generated_tokens_score_the_same_as_one_prefill(served: Served) -> None:
    """Engine against itself: log-probabilities while generating, then of the same tokens as one uncached prompt."""
    prompt = random_prompt(11, 80)
    generated = complete(served.server, prompt, 120)
    assert largest_error(served.checkpoint, prompt, generated) < LOGPROB_TOLERANCE
    whole = [*prompt, *generated.tokens]
    engine().forget(served.server)
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
    whole = chat(served.server, messages, 24, ignore_eos=True)
    assert len(whole.tokens) == 24
    assert largest_regret(served.checkpoint, whole.prompt, whole.tokens) < TIE_MARGIN

    pieces: list[str] = []
    for chunk in served.server.client.chat.completions.create(
        model=served.server.model,
        messages=messages,
        max_tokens=24,
        temperature=0,
        extra_body={"ignore_eos": True},
        stream=True,
    ):
        pieces += [choice.delta.content or "" for choice in chunk.choices]
    assert "".join(pieces) == whole.text
    assert sum(map(bool, pieces)) > 1


def test_completions_of_the_openai_api(served: Served) -> None:
    """Whole and streamed, the same tokens as the engine's own way in gives."""
    prompt = random_prompt(19, 30)
    create = served.server.client.completions.create
    extra = {"return_token_ids": True, "ignore_eos": True}
    (whole,) = create(
        model=served.server.model, prompt=list(prompt), max_tokens=16, temperature=0, extra_body=extra
    ).model_dump()["choices"]
    assert len(whole["token_ids"]) == 16
    assert largest_regret(served.checkpoint, prompt, whole["token_ids"]) < TIE_MARGIN
    streamed: list[int] = []
    for chunk in create(
        model=served.server.model, prompt=list(prompt), max_tokens=16, temperature=0, extra_body=extra, stream=True
    ):
        for choice in chunk.model_dump()["choices"]:
            streamed += choice.get("token_ids") or []
    assert streamed == whole["token_ids"]


def test_abandoned_requests_leave_no_trace(served: Served) -> None:
    """Four answers are dropped in their middle; those beside them and those after them are the oracle's."""
    golden = golden_prompts(served.checkpoint, LENGTHS, 40)
    prompts = [random_prompt(100 + i, 60 + i) for i in range(4)]
    with ThreadPoolExecutor(8) as pool:
        dropped = [pool.submit(begin_and_leave, served.server, prompt) for prompt in prompts]
        kept = list(pool.map(lambda g: complete(served.server, g.prompt, 40), golden[:4]))
        assert all(job.result() for job in dropped)
    kept += complete_together(served.server, [g.prompt for g in golden[4:]], 40)
    for expected, found in zip(golden, kept, strict=True):
        assert found.tokens == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"
        assert largest_error(served.checkpoint, expected.prompt, found) < LOGPROB_TOLERANCE
    for prompt in prompts:  # what they left in the cache, if anything, is right
        found = complete(served.server, prompt, 10)
        assert largest_error(served.checkpoint, prompt, found) < LOGPROB_TOLERANCE


def begin_and_leave(server: Server, prompt: tuple[int, ...]) -> bool:
    """Streams a long answer and hangs up after its third piece, which the engine takes for an abort."""
    body = {"model": server.model, "prompt": list(prompt), "max_tokens": 400, "temperature": 0}
    body |= {"stream": True, "ignore_eos": True}
    with httpx.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60.0) as answer:
        pieces = (line for line in answer.iter_lines() if line.startswith("data: {"))
        return len(list(islice(pieces, 3))) == 3


def test_nothing_died(served: Served) -> None:
    complete(served.server, random_prompt(17, 20), 10)
    served.server.assert_alive()
    assert "Traceback" not in served.server.log
    drafted, _ = served.server.acceptance()
    assert (drafted > 0) == (served.setup.num_drafts > 0)
