"""Requests by token ids, so that what the engine computes can be laid beside the oracle token by token."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from .engine import Chat, Completion
from .server import Server, engine


def complete(
    server: Server,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int | None = None,
    score_prompt: bool = False,
    ignore_eos: bool = True,
) -> Completion:
    """An answer to a prompt of token ids, greedy unless told otherwise.

    `score_prompt` asks for the log-probability of each prompt token as well; the engine then recomputes the whole
    prompt without reading the prefix cache. `prompt_logprobs[i]` is about prompt token i + 1; nothing is known about
    the first.
    """
    return engine().complete(
        server,
        prompt,
        max_tokens,
        temperature=temperature,
        seed=seed,
        score_prompt=score_prompt,
        ignore_eos=ignore_eos,
    )


def complete_together(
    server: Server, prompts: Sequence[Sequence[int]], max_tokens: int | Sequence[int], **options: Any
) -> list[Completion]:
    """All prompts at once, so that they share the engine's steps; answers in the order of the prompts."""
    lengths = [max_tokens] * len(prompts) if isinstance(max_tokens, int) else max_tokens
    with ThreadPoolExecutor(len(prompts)) as pool:
        jobs = [
            pool.submit(complete, server, prompt, length, **options)
            for prompt, length in zip(prompts, lengths, strict=True)
        ]
        return [job.result() for job in jobs]


def chat(server: Server, messages: list[Any], max_tokens: int, ignore_eos: bool = False) -> Chat:
    """A greedy answer of /v1/chat/completions with its tokens and those of its prompt."""
    return engine().chat(server, messages, max_tokens, ignore_eos)
