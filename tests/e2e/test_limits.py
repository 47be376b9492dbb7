"""A server at its limits over HTTP: answers that fill the context, more conversations than the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from .engine import RefusedError, Setup
from .oracle import LOGPROB_TOLERANCE, golden_prompts, largest_error, random_prompt
from .requests import complete, complete_together
from .server import Server, engine, parameters

CONTEXT = 200
LONGEST = CONTEXT - engine().prompt_reserve


@pytest.fixture(scope="module", params=parameters(engine().limit_setups))
def served(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Iterator[tuple[Server, Path]]:
    setup: Setup = replace(request.param, max_model_len=CONTEXT)
    checkpoint = random_checkpoint(setup.shape)
    small = [*engine().flags(setup), *engine().small_pool()]
    with Server(checkpoint, *small, name=f"limits-{setup}") as server:
        yield server, checkpoint


@pytest.mark.parametrize("length", [LONGEST, LONGEST - 1, 161, 160, 159])
def test_an_answer_may_fill_the_context(served: tuple[Server, Path], length: int) -> None:
    server, checkpoint = served
    prompt = random_prompt(length, length)
    room = CONTEXT - engine().context_reserve - length
    for found in (complete(server, prompt, room), complete(server, prompt, room)):
        assert len(found.tokens) == room
        assert found.finish_reason == "length"
        assert largest_error(checkpoint, prompt, found) < LOGPROB_TOLERANCE


def test_a_token_more_is_refused(served: tuple[Server, Path]) -> None:
    server, _ = served
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(RefusedError):
            complete(server, random_prompt(1, length), 2)
    server.assert_alive()


def test_conversations_that_are_thrown_out_come_back_rightly(served: tuple[Server, Path]) -> None:
    server, checkpoint = served
    golden = golden_prompts(checkpoint, (120, 115, 110, 100, 90, 80, 70, 60), 70)
    for _ in range(2):
        found = complete_together(server, [g.prompt for g in golden], 70)
        for expected, answer in zip(golden, found, strict=True):
            assert answer.tokens == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"
            assert largest_error(checkpoint, expected.prompt, answer) < LOGPROB_TOLERANCE
    assert server.preemptions > 0
    server.assert_alive()
