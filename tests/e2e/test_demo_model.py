"""The shipped demo model over HTTP: readable answers, drafts that are mostly kept, turns that start from the cache."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from .engine import Setup
from .oracle import LOGPROB_TOLERANCE, TIE_MARGIN, largest_error, largest_regret
from .requests import chat, complete
from .server import Server, engine, parameters

STORIES = (
    ["My name is Ada and I live in Oslo.", "What is my name?", "Where do I live?"],
    ["Count from 3 to 9.", "And from 1 to 6?", "Thank you."],
    ["Repeat after me: red green blue red.", "Say it once more.", "What did you say first?"],
    ["I have a dog. Its name is Rex.", "What is the name of my dog?", "Do I have a dog?"],
    ["My favourite colour is green.", "What is my favourite colour?", "Count from 2 to 5."],
    ["My name is Leo.", "Count from 4 to 8.", "What is my name?"],
    ["Copy this: seven lions sleep.", "Copy it again.", "My name is Mia."],
    ["I live in Rome.", "Where do I live?", "My name is Tom. What is my name?"],
)


@dataclass
class Served:
    server: Server
    checkpoint: Path
    setup: Setup


@pytest.fixture(scope="module", params=parameters(engine().demo_setups))
def served(request: pytest.FixtureRequest, demo_checkpoint: Path) -> Iterator[Served]:
    setup: Setup = replace(request.param, max_model_len=1024)
    with Server(demo_checkpoint, *engine().flags(setup), name=str(setup)) as server:
        yield Served(server, demo_checkpoint, setup)


def converse(served: Served, story: list[str]) -> int:
    """A conversation of several turns, each answer against the oracle; returns how many tokens came from the cache."""
    messages: list[Any] = []
    cached = 0
    for question in story:
        messages.append({"role": "user", "content": question})
        answer = chat(served.server, messages, 60)
        cached += answer.cached_tokens
        assert largest_regret(served.checkpoint, answer.prompt, answer.tokens) < TIE_MARGIN, question
        messages.append({"role": "assistant", "content": answer.text})
    return cached


def test_eight_conversations_at_once_answer_as_the_oracle(served: Served) -> None:
    with ThreadPoolExecutor(8) as pool:
        cached = sum(pool.map(lambda story: converse(served, story), STORIES))
    assert served.setup.cache or cached == 0


def test_it_remembers_what_it_was_told(served: Served) -> None:
    messages: list[Any] = [
        {"role": "user", "content": "My name is Ada."},
        {"role": "assistant", "content": "Nice to meet you, Ada."},
        {"role": "user", "content": "What is my name?"},
    ]
    assert "Ada" in chat(served.server, messages, 40).text


def test_long_conversations_start_from_the_cache(served: Served) -> None:
    """Turns of a long conversation: hits are asserted, and every answer's log-probabilities are the oracle's."""
    tokenizer = AutoTokenizer.from_pretrained(served.checkpoint)
    told = [
        f"My friend {name} lives in {place}." for name, place in (("Ada", "Oslo"), ("Leo", "Rome"), ("Mia", "Bonn"))
    ]
    messages: list[dict[str, str]] = []
    for line in told * 3:
        messages += [{"role": "user", "content": line}, {"role": "assistant", "content": "I will remember that."}]
    cached = 0
    for question in ("Where does Ada live?", "Where does Leo live?", "Where does Mia live?"):
        messages.append({"role": "user", "content": question})
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        found = complete(served.server, prompt, 40, ignore_eos=False)
        cached += found.cached_tokens
        assert largest_error(served.checkpoint, prompt, found) < LOGPROB_TOLERANCE
        text = tokenizer.decode(found.tokens, skip_special_tokens=True)
        messages.append({"role": "assistant", "content": text})
    assert (cached > 0) == bool(served.setup.cache)


def test_more_than_half_of_the_drafts_are_kept(served: Served) -> None:
    """Over these conversations and everything that was asked before."""
    for story in STORIES[:4]:
        converse(served, story)
    drafted, accepted = served.server.acceptance()
    if served.setup.num_drafts:
        assert drafted > 100
        assert accepted / drafted > 0.5
    else:
        assert drafted == 0


def test_nothing_died(served: Served) -> None:
    served.server.assert_alive()
    assert len(served.server.activation_lines()) == 1
