"""How far a server's log-probabilities are from the oracle's, for the very build that is being timed."""

import asyncio
from statistics import mean
from typing import Any

import numpy as np

from .client import BenchError, Client
from .prompts import prompt_of
from .rows import Engine

PROMPTS = 8
PROMPT_TOKENS = 64
TOP = 20


def logit_prompts(vocab_size: int) -> list[list[int]]:
    """The prompts whose next token is compared."""
    return [prompt_of(PROMPT_TOKENS, f"logits {i}", vocab_size) for i in range(PROMPTS)]


def relative_logit_error(client: Client, engine: Engine, oracle: "np.ndarray[Any, Any]") -> float:
    """Root mean square difference between a server's `TOP` log-probabilities and the oracle's for the same tokens, over
    the standard deviation of the oracle's over the vocabulary; the mean over all prompts.

    oracle: [prompts, vocabulary] as `oracle` writes it. Raises BenchError if the server sends no log-probabilities.
    """
    errors = []
    for prompt, expected in zip(logit_prompts(oracle.shape[1]), oracle.astype(np.float64), strict=True):
        found = asyncio.run(_top(client, engine, prompt))
        if len(found) < min(TOP, len(expected)) // 2:
            raise BenchError(f"The server sent {len(found)} log-probabilities where {TOP} were asked for.")
        differences = np.array([value - expected[token] for token, value in found.items()])
        errors.append(float(np.sqrt(np.mean(differences**2)) / np.std(expected)))
    return mean(errors)


async def _top(client: Client, engine: Engine, prompt: list[int]) -> dict[int, float]:
    """Token ids and log-probabilities of the likeliest next tokens."""
    if engine == "vllm":
        body = {"model": client.model, "prompt": prompt, "max_tokens": 1, "temperature": 0, "logprobs": TOP}
        answer = await client.post("/v1/completions", body | {"return_tokens_as_token_ids": True})
        top = answer["choices"][0]["logprobs"]["top_logprobs"][0]
        return {int(name.rpartition(":")[2]): float(value) for name, value in top.items()}
    parameters = {"max_new_tokens": 1, "temperature": 0}
    body = {"input_ids": prompt, "sampling_params": parameters, "return_logprob": True, "top_logprobs_num": TOP}
    answer = await client.post("/generate", body)
    return {int(token): float(value) for value, token, *_ in answer["meta_info"]["output_top_logprobs"][0]}
