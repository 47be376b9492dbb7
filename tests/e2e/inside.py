"""An engine inside this process, for what no API shows: the recurrent states that its cache keeps, and drafts to order.

Run as `python -m tests.e2e.inside job.json result.pt`; `run_inside` starts it and returns what it found. Drafts come
from a known answer, with faults, so that a random-weight model accepts 0 to all of them in every mixture and in steps
of every length; the engine's own drafter runs as usual and its proposals are replaced on their way to the scheduler.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .server import environment


@dataclass
class Ask:
    """One request. `answer` are the tokens that drafts are made of (usually what the oracle says will come)."""

    prompt: list[int]
    max_tokens: int
    answer: list[int] = field(default_factory=list)


@dataclass
class Job:
    """Rounds of requests that run together, one round after the other, on one engine."""

    model: str
    engine: dict[str, Any]
    rounds: list[list[Ask]]
    draft_fault_rate: float = 0.3
    """Probability that a draft is wrong, and that a step gets fewer than configured; below 0 leaves drafts alone."""
    poison: bool = True
    """Fill the cache with NaN before the first request, so that a state nobody wrote shows."""


@dataclass
class Found:
    """A recurrent state in the prefix cache: where it stands and what the engine keeps for it, one entry a layer."""

    tokens: list[int]
    conv: dict[str, torch.Tensor]
    ssm: dict[str, torch.Tensor]


@dataclass
class Result:
    """What came of a job: per round and request its tokens and cached tokens; then all cached states and counters."""

    tokens: list[list[list[int]]]
    cached: list[list[int]]
    states: list[Found]
    block_size: int
    preemptions: int
    accepted: dict[int, int]
    """How often a verify step kept n tokens (1: no draft)."""
    step_lengths: dict[int, int]
    """How often a decode step computed n tokens."""
    skipped_steps: int
    """How often a running request was left out of a step."""


def run_inside(job: Job, seconds: float = 600.0) -> Result:
    """Runs a job in a process of its own, in the environment of an engine: without Triton's interpreter, offline."""
    with tempfile.TemporaryDirectory(prefix="qwen3next-inside-") as folder:
        job_path, result_path, log_path = (Path(folder) / name for name in ("job.json", "result.pt", "log"))
        job_path.write_text(json.dumps(asdict(job)))
        with log_path.open("wb") as log:
            ended = subprocess.run(
                [sys.executable, "-m", "tests.e2e.inside", str(job_path), str(result_path)],
                cwd=Path(__file__).parents[2],
                env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0"),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                timeout=seconds,
                check=False,
            )
        tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-60:])
        assert ended.returncode == 0, tail
        content = torch.load(result_path, weights_only=False)
        content["states"] = [Found(**state) for state in content["states"]]
        return Result(**content)


class _Engine:
    """The engine and the few places where this process looks into it."""

    def __init__(self, job: dict[str, Any]) -> None:
        from vllm import LLM

        self.llm = LLM(model=job["model"], skip_tokenizer_init=True, **job["engine"])
        core = self.llm.llm_engine.engine_core.engine_core
        self.scheduler = core.scheduler
        self.runner = core.model_executor.driver_worker.worker.model_runner
        self.block_size = self.llm.llm_engine.vllm_config.cache_config.block_size
        self.random = random.Random(0)
        self.fault_rate = job["draft_fault_rate"]
        self.answers: dict[tuple[int, ...], list[int]] = {}
        self.requests: dict[str, Any] = {}
        self.preemptions = self.skipped_steps = 0
        self.accepted: dict[int, int] = {}
        self.step_lengths: dict[int, int] = {}
        self._watch()
        if job["poison"]:
            for state in self._states():
                state.fill_(float("nan"))

    def _states(self) -> list[torch.Tensor]:
        layers = self.runner.compilation_config.static_forward_context.values()
        return [state for layer in layers if isinstance(layer.kv_cache, tuple) for state in layer.kv_cache]

    def _watch(self) -> None:
        scheduler, runner = self.scheduler, self.runner
        add, preempt, update = scheduler.add_request, scheduler._preempt_request, scheduler.update_draft_token_ids
        schedule, sampled = scheduler.schedule, runner._update_states_after_model_execute

        def add_request(request: Any) -> None:
            self.requests[request.request_id] = request
            add(request)

        def preempt_request(*args: Any, **kwargs: Any) -> None:
            self.preemptions += 1
            preempt(*args, **kwargs)

        def update_draft_token_ids(drafts: Any) -> None:
            if self.fault_rate >= 0:
                for i, (request_id, proposed) in enumerate(zip(drafts.req_ids, drafts.draft_token_ids, strict=True)):
                    drafts.draft_token_ids[i] = self._drafts(request_id, len(proposed))
            update(drafts)

        def count_step(*args: Any, **kwargs: Any) -> Any:
            running = {r.request_id for r in scheduler.running if r.num_computed_tokens >= r.num_prompt_tokens}
            output = schedule(*args, **kwargs)
            alive = running & {r.request_id for r in scheduler.running}
            self.skipped_steps += len(alive - set(output.num_scheduled_tokens))
            for request_id in alive & set(output.num_scheduled_tokens):
                length = output.num_scheduled_tokens[request_id]
                self.step_lengths[length] = self.step_lengths.get(length, 0) + 1
            return output

        def count_accepted(tokens: torch.Tensor, output: Any) -> None:
            for request_id, kept in zip(runner.input_batch.req_ids, (tokens != -1).sum(1).tolist(), strict=True):
                if request_id in output.scheduled_spec_decode_tokens:
                    self.accepted[kept] = self.accepted.get(kept, 0) + 1
            sampled(tokens, output)

        scheduler.add_request, scheduler._preempt_request = add_request, preempt_request
        scheduler.update_draft_token_ids, scheduler.schedule = update_draft_token_ids, count_step
        runner._update_states_after_model_execute = count_accepted

    def _drafts(self, request_id: str, count: int) -> list[int]:
        request = self.requests[request_id]
        done = request.num_output_tokens
        drafts = self.answers[tuple(request.prompt_token_ids)][done : done + count]
        if self.random.random() < self.fault_rate:
            drafts = drafts[: self.random.randrange(count + 1)]
        return [t if self.random.random() >= self.fault_rate else (t + 1) % 256 for t in drafts]

    def run(self, asks: Sequence[dict[str, Any]]) -> tuple[list[list[int]], list[int]]:
        """One round: all requests at once; returns their tokens and how many prompt tokens came from the cache."""
        from vllm import SamplingParams

        self.answers |= {tuple(ask["prompt"]): ask["answer"] for ask in asks}
        params = [
            SamplingParams(temperature=0.0, max_tokens=ask["max_tokens"], ignore_eos=True, detokenize=False)
            for ask in asks
        ]
        outputs = self.llm.generate([{"prompt_token_ids": ask["prompt"]} for ask in asks], params, use_tqdm=False)
        return [list(o.outputs[0].token_ids) for o in outputs], [o.num_cached_tokens or 0 for o in outputs]

    def cached_states(self) -> list[dict[str, Any]]:
        """Every recurrent state that a later request could start from, once."""
        manager = self.scheduler.kv_cache_manager
        groups = manager.kv_cache_config.kv_cache_groups
        context = self.runner.compilation_config.static_forward_context
        mamba = [i for i, g in enumerate(groups) if isinstance(context[g.layer_names[0]].kv_cache, tuple)]
        found: dict[bytes, dict[str, Any]] = {}
        for request in self.requests.values():
            for index, block_hash in enumerate(request.block_hashes):
                blocks = manager.block_pool.get_cached_block(block_hash, mamba)
                if blocks is None or block_hash in found:
                    continue
                conv, ssm = {}, {}
                for group, block in zip(mamba, blocks, strict=True):
                    for name in groups[group].layer_names:
                        states = context[name].kv_cache
                        conv[name], ssm[name] = (state[block.block_id].clone() for state in states)
                size = manager.block_pool.hash_block_size
                found[block_hash] = {
                    "tokens": list(request.all_token_ids)[: (index + 1) * size],
                    "conv": conv,
                    "ssm": ssm,
                }
        return list(found.values())


def main(job_path: str, result_path: str) -> None:
    job = json.loads(Path(job_path).read_text())
    engine = _Engine(job)
    rounds = [engine.run(asks) for asks in job["rounds"]]
    torch.save(
        {
            "tokens": [tokens for tokens, _ in rounds],
            "cached": [cached for _, cached in rounds],
            "states": engine.cached_states() if job["engine"].get("enable_prefix_caching") else [],
            "block_size": engine.block_size,
            "preemptions": engine.preemptions,
            "accepted": engine.accepted,
            "step_lengths": engine.step_lengths,
            "skipped_steps": engine.skipped_steps,
        },
        result_path,
    )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
