"""The fifty golden prompts, asked as users serve: the checkpoint's own bfloat16, the prefix cache and drafts on.

Every engine, version and device has to give the same tokens; the file's margins leave bfloat16 no excuse.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.reference import ReferenceModel
from tests.golden.make import MAX_TOKENS, GoldenPrompt, read

from .engine import Completion, Setup
from .requests import complete, complete_together
from .server import Server, engine

GOLDEN = read()
LIKELY = 0.01
"""Log-probabilities of tokens that are less likely say nothing: the model was never asked to tell them apart."""

pytestmark = pytest.mark.quick


@pytest.fixture(scope="module")
def server(demo_checkpoint: Path) -> Iterator[Server]:
    setup = Setup("demo", 3, engine().cache, max_model_len=2048, dtype="auto")
    with Server(demo_checkpoint, *engine().flags(setup), env=engine().usual, name="golden") as started:
        yield started


@pytest.fixture(scope="module")
def found(server: Server) -> list[Completion]:
    """All answers, eight requests at a time."""
    answers = []
    for start in range(0, len(GOLDEN.prompts), 8):
        prompts = [golden.prompt for golden in GOLDEN.prompts[start : start + 8]]
        answers += complete_together(server, prompts, MAX_TOKENS, ignore_eos=False)
    return answers


def test_all_answers_are_the_golden_ones(found: list[Completion]) -> None:
    wrong = [
        number
        for number, (golden, answer) in enumerate(zip(GOLDEN.prompts, found, strict=True))
        if answer.tokens != golden.answer
    ]
    assert wrong == []


def test_they_are_the_same_from_the_cache(server: Server) -> None:
    """The longest prompts twice more; the second time at least they start from states that the first left behind."""
    for golden in sorted(GOLDEN.prompts, key=lambda golden: len(golden.prompt))[-4:]:
        for _ in range(2):
            answer = complete(server, golden.prompt, MAX_TOKENS, ignore_eos=False)
            assert answer.tokens == golden.answer
        assert answer.cached_tokens > len(golden.prompt) // 2


@lru_cache(maxsize=2)
def oracle_in(checkpoint: Path, dtype: torch.dtype) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(checkpoint, dtype)


@torch.no_grad()
def logprobs(checkpoint: Path, dtype: torch.dtype, golden: GoldenPrompt) -> torch.Tensor:
    """The oracle's log-probabilities [len(answer), vocab] in an arithmetic."""
    model = oracle_in(checkpoint, dtype)
    tokens = model.tokens([*golden.prompt, *golden.answer[:-1]])
    return model(tokens)[0, len(golden.prompt) - 1 :].double().log_softmax(-1)


def test_log_probabilities_are_within_the_noise_of_bfloat16(demo_checkpoint: Path, found: list[Completion]) -> None:
    """The oracle in bfloat16 differs from itself in float64; the engine may differ by a few times as much."""
    noise, errors = [], []
    for golden, answer in zip(GOLDEN.prompts[::3], found[::3], strict=True):
        exact = logprobs(demo_checkpoint, torch.float64, golden)
        rounded = logprobs(demo_checkpoint, torch.bfloat16, golden)
        for place, top in enumerate(answer.top_logprobs):
            for token, logprob in top.items():
                if exact[place, token].exp() > LIKELY:
                    noise.append(abs(float(rounded[place, token] - exact[place, token])))
                    errors.append(abs(logprob - float(exact[place, token])))
    assert len(errors) > 100
    assert max(errors) < 4 * max(noise) + 1e-3, (max(errors), max(noise))
