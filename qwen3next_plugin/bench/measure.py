"""One repeat of one row against a running server.

Decoding is timed inside the engine (`steps`), the same place for every side: an HTTP client sees 256 streams through a
Python server that may be slower than the GPU. What the client saw is kept beside it. Prompts and traffic are timed
where the user is: from sending the request to its first token.
"""

import asyncio
import json
import random
import time
from statistics import median
from typing import Any

from qwen3next_plugin.recording import PROFILE_REQUEST

from .client import Answer, BenchError
from .prompts import prompt_of
from .rows import Row
from .server import Server
from .steps import decode_times, expert_counts, read_steps

LEAST_STEPS = 16
PROFILE_STEPS = 16
PROFILER_SECONDS = 3.0
TRAFFIC_TOKENS = 128
TRAFFIC_SECONDS = 30.0
# Tokens that a request decodes while others' prompts are still computed: they do not count, but have to be asked for.
_PROMPT_TOKENS_A_STEP = 4096


def measure(server: Server, row: Row, repeat: int, steps: int, vocab_size: int) -> dict[str, Any]:
    """One repeat: ``{"value": ..., ...}`` in the row's unit, or ``{"values": {metric: ...}}`` for traffic.

    Raises BenchError where too few steps had exactly the batch asked for.
    """
    if row.kind == "decode":
        return _decode(server, row, repeat, steps, vocab_size)
    if row.kind == "prefill":
        prompt = prompt_of(int(row.size), f"{row.name} {repeat}", vocab_size)
        return {"value": asyncio.run(server.client.stream(prompt, 1)).first_token}
    if row.kind == "traffic":
        return _traffic(server, row, repeat, vocab_size)
    if row.kind == "profile":
        return _profile(server, row.profiled, steps, vocab_size)
    return {"value": server.start_seconds}


def decode_length(row: Row, steps: int) -> int:
    """Tokens to ask for, so that ``steps`` steps have everybody decoding."""
    return steps + 16 + int(row.size) * row.prompt_tokens // _PROMPT_TOKENS_A_STEP


def _decode(server: Server, row: Row, repeat: int, steps: int, vocab_size: int) -> dict[str, Any]:
    batch = int(row.size)
    prompts = [prompt_of(row.prompt_tokens, f"{row.name} {repeat} {i}", vocab_size) for i in range(batch)]
    begin = time.perf_counter_ns()
    answers = asyncio.run(_together(server, prompts, decode_length(row, steps)))
    times = decode_times(read_steps(server.record, begin), batch)
    if len(times) < LEAST_STEPS:
        raise BenchError(
            f"{row.name}: only {len(times)} steps had exactly {batch} requests decoding, {LEAST_STEPS} are wanted: the "
            "server holds fewer requests at once (see its log), or --steps is too small."
        )
    return {"value": median(times), "steps": len(times), "client": _client_gap(answers)}


def _profile(server: Server, row: Row, steps: int, vocab_size: int) -> dict[str, Any]:
    """``{"trace": file, "steps": ...}`` of `PROFILE_STEPS` decoding steps, or of one prompt."""
    trace = server.record / f"trace-{row.name}.json"
    decode = row.kind == "decode"
    request = {"requests": int(row.size) if decode else 0, "steps": PROFILE_STEPS if decode else 1, "trace": str(trace)}
    part = server.record / "request.part"
    part.write_text(json.dumps(request), encoding="utf-8")
    part.replace(server.record / PROFILE_REQUEST)
    if decode:
        _decode(server, row, -2, steps, vocab_size)
    else:
        # The profiler starts when a step ends: a small request first, then the prompt.
        asyncio.run(server.client.stream([1, 2, 3, 4], 1))
        time.sleep(PROFILER_SECONDS)
        asyncio.run(server.client.stream(prompt_of(int(row.size), f"{row.name} -2", vocab_size), 1))
    done, until = trace.with_suffix(".done"), time.monotonic() + 120
    while not done.exists():
        if time.monotonic() > until:
            raise BenchError(f"{row.name}: no profile was written; see the server's log.")
        time.sleep(0.1)
    return {"trace": str(trace), "steps": int(done.read_text())}


async def _together(server: Server, prompts: list[list[int]], max_tokens: int) -> list[Answer]:
    return list(await asyncio.gather(*(server.client.stream(prompt, max_tokens) for prompt in prompts)))


def _client_gap(answers: list[Answer]) -> float | None:
    """Median ms between chunks while every request was decoding, as the client saw it."""
    begin, end = max(a.chunks[0] for a in answers), min(a.chunks[-1] for a in answers)
    gaps = [
        (b - a) * 1e3
        for answer in answers
        for a, b in zip(answer.chunks, answer.chunks[1:], strict=False)
        if begin <= a
    ]
    return median(gaps) if gaps and end > begin else None


def _traffic(server: Server, row: Row, repeat: int, vocab_size: int) -> dict[str, Any]:
    answers = asyncio.run(_arrivals(server, row, repeat, vocab_size))
    first = sorted(answer.first_token * 1e3 for answer in answers)
    gaps = sorted(gap * 1e3 for answer in answers for gap in answer.gaps)
    values = {
        "ttft-p50": quantile(first, 0.5),
        "ttft-p99": quantile(first, 0.99),
        "itl-p50": quantile(gaps, 0.5),
        "itl-p99": quantile(gaps, 0.99),
    }
    return {"values": values, "requests": len(answers)}


async def _arrivals(server: Server, row: Row, repeat: int, vocab_size: int) -> list[Answer]:
    draw = random.Random(f"{row.name} {repeat}")  # noqa: S311
    times, now = [], 0.0
    while now < TRAFFIC_SECONDS:
        times.append(now)
        now += draw.expovariate(row.size)
    prompts = [prompt_of(row.prompt_tokens, f"{row.name} {repeat} {i}", vocab_size) for i in range(len(times))]

    async def one(at: float, prompt: list[int]) -> Answer:
        await asyncio.sleep(at)
        return await server.client.stream(prompt, TRAFFIC_TOKENS)

    return list(await asyncio.gather(*(one(at, prompt) for at, prompt in zip(times, prompts, strict=True))))


def quantile(ordered: list[float], share: float) -> float:
    """The value below which ``share`` of an ordered list lies (linear between neighbours)."""
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (place - low) * (ordered[high] - ordered[low])


def count_experts(server: Server, row: Row, chunk: int, vocab_size: int) -> dict[str, Any]:
    """Distinct experts a layer that a step of this row touches: ``{"tokens": ..., "layers": [...], "mean": ...}``."""
    if row.kind == "decode":
        tokens = int(row.size)
        prompts = [prompt_of(row.prompt_tokens, f"{row.name} 0 {i}", vocab_size) for i in range(tokens)]
        asyncio.run(_together(server, prompts, decode_length(row, 4)))
    else:
        tokens = min(chunk, int(row.size))
        asyncio.run(server.client.stream(prompt_of(tokens, f"{row.name} 0", vocab_size), 1))
    layers = expert_counts(server.record, tokens)
    if not layers:
        raise BenchError(f"{row.name}: no pass of exactly {tokens} tokens was seen by the routers.")
    return {"tokens": tokens, "layers": [round(n, 2) for n in layers], "mean": sum(layers) / len(layers)}
