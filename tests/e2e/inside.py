"""An engine in a process of its own, for what no API shows: the recurrent states that its cache keeps, drafts to order.

`run_inside` starts `tests.e2e.inside_vllm` or `tests.e2e.inside_sglang` with a job and returns what it found. Drafts
come from a known answer, with faults, so that a random-weight model accepts 0 to all of them in every mixture; the
engine's own drafter runs as usual and its proposals are replaced on their way to the verification.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .server import READY_SECONDS, engine, environment


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
    """Arguments of the engine, as `Engine.inside` makes them."""

    rounds: list[list[Ask]]
    draft_fault_rate: float = 0.3
    """Probability that a draft is wrong, and (vLLM) that a step gets fewer than configured; below 0 leaves drafts."""

    poison: bool = True
    """Fill the cache with NaN before the first request, so that a state nobody wrote shows."""


@dataclass
class Found:
    """A recurrent state in the prefix cache: where it stands and what the engine keeps for it, one entry a layer.

    `conv` [L >= W - 1, conv_dim], oldest input first; `ssm` [num_v_heads, head_v_dim, head_k_dim].
    """

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
    """Cached states stand at multiples of so many tokens; 1 where they may stand anywhere."""

    preemptions: int
    accepted: dict[int, int]
    """How often a verify step kept n tokens (1: no draft)."""

    step_lengths: dict[int, int] = field(default_factory=dict)
    """How often a decode step computed n tokens (vLLM: SGLang's steps are all alike)."""

    skipped_steps: int = 0
    """How often a running request was left out of a step (vLLM)."""


class Drafts:
    """Answers known beforehand, cut and spoilt at random."""

    def __init__(self, job: dict[str, Any]) -> None:
        self.random = random.Random(0)
        self.fault_rate: float = job["draft_fault_rate"]
        self.answers = {tuple(ask["prompt"]): ask["answer"] for asks in job["rounds"] for ask in asks}

    def __call__(self, prompt: list[int], done: int, count: int) -> list[int]:
        """Up to `count` drafts for what follows the first `done` tokens of the answer to `prompt`."""
        drafts = self.answers[tuple(prompt)][done : done + count]
        return [t if self.random.random() >= self.fault_rate else (t + 1) % 256 for t in drafts]

    def shortened(self, drafts: list[int]) -> list[int]:
        """Now and then fewer of them."""
        if self.random.random() < self.fault_rate:
            return drafts[: self.random.randrange(len(drafts) + 1)]
        return drafts


def run_inside(job: Job, seconds: float = READY_SECONDS) -> Result:
    """Runs a job in a process of its own, in the environment of an engine: without Triton's interpreter, offline."""
    with tempfile.TemporaryDirectory(prefix="qwen3next-inside-") as folder:
        job_path, result_path, log_path = (Path(folder) / name for name in ("job.json", "result.pt", "log"))
        job_path.write_text(json.dumps(asdict(job)))
        with log_path.open("wb") as log:
            ended = subprocess.run(
                [sys.executable, "-m", f"tests.e2e.inside_{engine().name}", str(job_path), str(result_path)],
                cwd=Path(__file__).parents[2],
                # The runner that `inside_vllm` looks into; on a GPU vLLM would take its second one.
                env=environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_USE_V2_MODEL_RUNNER="0"),
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
