"""Requests by token ids, so that what the engine computes can be laid beside the oracle token by token."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from .server import Server

TOP_LOGPROBS = 20


@dataclass
class Completion:
    """One answer: its tokens, their log-probabilities, the likeliest alternatives at each place, and cached tokens."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    cached_tokens: int
    finish_reason: str
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)


def complete(
    server: Server,
    prompt: Sequence[int],
    max_tokens: int,
    *,
    temperature: float = 0.0,
    score_prompt: bool = False,
    ignore_eos: bool = True,
    **options: Any,
) -> Completion:
    """/v1/completions for a prompt of token ids, greedy unless told otherwise.

    `score_prompt` asks for the log-probability of each prompt token as well; vLLM then recomputes the whole prompt
    without reading the prefix cache. `prompt_logprobs[i]` is about prompt token i; nothing is known about the first.
    """
    extra: dict[str, Any] = {"return_token_ids": True, "return_tokens_as_token_ids": True, "ignore_eos": ignore_eos}
    if score_prompt:
        extra["prompt_logprobs"] = TOP_LOGPROBS
    answer = server.client.completions.create(
        model=server.model,
        prompt=list(prompt),
        max_tokens=max_tokens,
        temperature=temperature,
        logprobs=TOP_LOGPROBS,
        extra_body=extra,
        **options,
    )
    choice = answer.choices[0].model_dump()
    usage = answer.usage.model_dump() if answer.usage else {}
    logprobs = choice["logprobs"]
    prompt_logprobs = [
        {int(token): entry["logprob"] for token, entry in place.items()}
        for place in choice.get("prompt_logprobs") or []
        if place is not None
    ]
    return Completion(
        tokens=choice["token_ids"],
        logprobs=logprobs["token_logprobs"],
        top_logprobs=[{_token_id(t): p for t, p in place.items()} for place in logprobs["top_logprobs"]],
        cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
        finish_reason=choice["finish_reason"],
        prompt_logprobs=prompt_logprobs,
    )


def _token_id(token: str) -> int:
    return int(token.removeprefix("token_id:"))


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
