"""A server at its limits over HTTP: answers that fill the context, more conversations than the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import openai
import pytest

from .engine import RefusedError, Setup
from .oracle import LOGPROB_TOLERANCE, golden_prompts, largest_error, random_prompt
from .requests import complete, complete_together
from .server import Server, engine, parameters

CONTEXT = 200
LONGEST = CONTEXT - engine().prompt_reserve
MOST_TURNS = 6


@dataclass
class Served:
    """A server beside the checkpoint it serves; `reach` is how long prompt and answer may be together."""

    server: Server
    checkpoint: Path
    reach: int


@pytest.fixture(scope="module", params=parameters(engine().limit_setups))
def served(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Iterator[Served]:
    setup: Setup = replace(request.param, max_model_len=CONTEXT)
    checkpoint = random_checkpoint(setup.shape)
    small = [*engine().flags(setup), *engine().small_pool()]
    with Server(checkpoint, *small, name=f"limits-{setup}") as server:
        yield Served(server, checkpoint, CONTEXT - engine().context_reserve(setup.num_drafts))


@pytest.mark.parametrize("length", [LONGEST, LONGEST - 1, 161, 160, 159])
def test_an_answer_may_fill_the_context(served: Served, length: int) -> None:
    server, checkpoint = served.server, served.checkpoint
    prompt = random_prompt(length, length)
    room = served.reach - length
    for found in (complete(server, prompt, room), complete(server, prompt, room)):
        assert len(found.tokens) == room
        assert found.finish_reason == "length"
        assert largest_error(checkpoint, prompt, found) < LOGPROB_TOLERANCE


def test_a_token_more_is_refused(served: Served) -> None:
    server = served.server
    for length in (LONGEST + 1, CONTEXT, CONTEXT + 1):
        prompt = list(random_prompt(1, length))
        with pytest.raises(openai.BadRequestError):
            server.client.completions.create(model=server.model, prompt=prompt, max_tokens=2)
    server.assert_alive()


def test_an_answer_ends_with_the_context(served: Served) -> None:
    """vLLM cuts an answer that was asked to be longer, SGLang refuses it."""
    server, prompt = served.server, random_prompt(2, 100)
    try:
        assert len(complete(server, prompt, CONTEXT - 99).tokens) == served.reach - 100
    except RefusedError as error:
        assert "context" in str(error)
    server.assert_alive()


def test_conversations_that_are_thrown_out_come_back_rightly(served: Served) -> None:
    """Short prompts and long answers: an engine lets in what it has room for now, and then they grow.

    On a busy machine they may arrive so far apart that there is room for all: then once more.
    """
    server, checkpoint = served.server, served.checkpoint
    golden = golden_prompts(checkpoint, (60, 55, 50, 45, 40, 35, 30, 25), 120)
    for turn in range(MOST_TURNS):
        if turn >= 2 and server.preemptions > 0:
            break
        found = complete_together(server, [g.prompt for g in golden], 120, ignore_eos=False)
        for expected, answer in zip(golden, found, strict=True):
            assert answer.tokens == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"
            assert largest_error(checkpoint, expected.prompt, answer) < LOGPROB_TOLERANCE
    assert server.preemptions > 0
    server.assert_alive()
