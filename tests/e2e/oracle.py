"""The oracle's side of an end-to-end comparison: its own greedy answers, and its verdict on the engine's."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from qwen3next_plugin.reference import LayerState, ReferenceCache, ReferenceModel, generate_greedy

from .requests import Completion

TIE_MARGIN = 3e-3
"""Logits by which every token of a golden answer must win: far above the engine's float32 error, which tests assert."""

LOGPROB_TOLERANCE = 2e-3
"""Largest difference of a log-probability between a float32 engine and the float64 oracle."""


@dataclass(frozen=True)
class Golden:
    """A prompt and its greedy answer, each token of which the oracle prefers by at least TIE_MARGIN.

    None of them is one that ends an answer, so nobody has to be told to ignore those: SGLang reserves room for all of
    an answer that ignores them, and then never throws anyone out.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@lru_cache(maxsize=4)
def oracle(checkpoint: Path) -> ReferenceModel:
    """In float64, so that only the engine's rounding counts."""
    return ReferenceModel.from_checkpoint(checkpoint, torch.float64)


def random_prompt(seed: int, length: int, vocab_size: int = 256) -> tuple[int, ...]:
    """Bytes of the tests' tokenizer: special tokens stand behind them."""
    return tuple(random.Random(seed).choices(range(vocab_size), k=length))


@lru_cache(maxsize=64)
def golden_prompts(
    checkpoint: Path, starts: tuple[int | tuple[int, ...], ...], max_tokens: int, seed: int = 0
) -> list[Golden]:
    """A golden prompt for each start: a number of random tokens, or tokens to which up to a few random ones are added.

    Prompts whose answers come near a tie, or to an end, are drawn again.
    """
    ends = set(json.loads((checkpoint / "generation_config.json").read_text())["eos_token_id"])
    found = []
    for index, start in enumerate(starts):
        for attempt in range(30):
            key = seed + 1000 * index + attempt
            prompt = random_prompt(key, start) if isinstance(start, int) else (*start, *random_prompt(key, attempt))
            answer = generate_greedy(oracle(checkpoint), [prompt], max_tokens)[0]
            if answer.smallest_margin >= TIE_MARGIN and not ends.intersection(answer.tokens):
                found.append(Golden(prompt, tuple(answer.tokens)))
                break
        else:
            raise AssertionError(f"30 prompts, none with {max_tokens} tokens of answer free of ties and ends")
    return found


@torch.no_grad()
def oracle_states(checkpoint: Path, tokens: Sequence[int]) -> dict[str, LayerState]:
    """State of every Gated DeltaNet layer after `tokens`, by the layer's name in the engine."""
    cache = ReferenceCache()
    oracle(checkpoint)(torch.tensor([list(tokens)]), cache)
    return {f"{prefix}linear_attn": state for prefix, state in cache.layers.items() if state.ssm is not None}


@torch.no_grad()
def oracle_logprobs(checkpoint: Path, tokens: Sequence[int]) -> torch.Tensor:
    """Log-probabilities [len(tokens), vocab] of what follows each token, from one float64 prefill."""
    return oracle(checkpoint)(torch.tensor([list(tokens)]))[0].log_softmax(-1)


def largest_error(checkpoint: Path, prompt: Sequence[int], completion: Completion) -> float:
    """Largest |log-probability - oracle's| over every token the engine reported for its own answer.

    The oracle scores prompt and answer as one prefill, so an engine state that went wrong anywhere shows here, also
    where its tokens look reasonable.
    """
    expected = oracle_logprobs(checkpoint, [*prompt, *completion.tokens])
    assert len(completion.top_logprobs) == len(completion.tokens) > 0
    worst = 0.0
    for place, (token, logprob, top) in enumerate(
        zip(completion.tokens, completion.logprobs, completion.top_logprobs, strict=True)
    ):
        row = expected[len(prompt) + place - 1]
        for candidate, found in ({token: logprob} | top).items():
            worst = max(worst, abs(float(row[candidate]) - found))
    return worst


def largest_regret(checkpoint: Path, prompt: Sequence[int], tokens: Sequence[int]) -> float:
    """How much less likely than the oracle's choice an answer's token ever was: 0 where both choose alike."""
    rows = oracle_logprobs(checkpoint, [*prompt, *tokens])[len(prompt) - 1 : -1]
    chosen = rows.gather(1, torch.tensor(list(tokens)).unsqueeze(1)).squeeze(1)
    return float((rows.max(1).values - chosen).max())


def largest_prompt_error(checkpoint: Path, prompt: Sequence[int], completion: Completion) -> float:
    """The same over the prompt's own tokens, which the engine computed as one prefill."""
    expected = oracle_logprobs(checkpoint, prompt)
    assert len(completion.prompt_logprobs) == len(prompt) - 1
    return max(
        abs(float(expected[place][token]) - found)
        for place, candidates in enumerate(completion.prompt_logprobs)
        for token, found in candidates.items()
    )
