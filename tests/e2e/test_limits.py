"""A server at its limits over HTTP: answers that fill the context, more conversations than the cache holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from .oracle import LOGPROB_TOLERANCE, golden_prompts, largest_error, random_prompt
from .requests import complete, complete_together
from .server import Server, flags

CONTEXT = 200
NUM_BLOCKS = 48


@pytest.fixture(scope="module", params=[0, 3], ids=["no mtp", "mtp3"])
def served(request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path]) -> Iterator[tuple[Server, Path]]:
    checkpoint = random_checkpoint("ratio2")
    small = [*flags(request.param, cache=True, max_model_len=CONTEXT), "--num-gpu-blocks-override", str(NUM_BLOCKS)]
    with Server(checkpoint, *small, name=f"limits-{request.param}") as server:
        yield server, checkpoint


@pytest.mark.parametrize("length", [CONTEXT - 1, CONTEXT - 2, 161, 160, 159])
def test_an_answer_may_fill_the_context(served: tuple[Server, Path], length: int) -> None:
    server, checkpoint = served
    prompt = random_prompt(length, length)
    for found in (complete(server, prompt, CONTEXT - length), complete(server, prompt, CONTEXT - length)):
        assert len(found.tokens) == CONTEXT - length
        assert found.finish_reason == "length"
        assert largest_error(checkpoint, prompt, found) < LOGPROB_TOLERANCE


def test_a_token_more_is_refused(served: tuple[Server, Path]) -> None:
    server, _ = served
    for length in (CONTEXT, CONTEXT + 1):
        with pytest.raises(openai.BadRequestError):
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
