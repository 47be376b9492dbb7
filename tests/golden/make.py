"""Fifty prompts whose greedy answers have no near ties, with those answers: what every engine must give, exactly.

    python -m tests.golden.make           writes prompts.json anew, from the oracle and the shipped demo model
    python -m tests.golden.make --check   compares the file with the oracle; exit code 1 and a sentence if it differs

The prompts are held-out conversations of every kind of turn, from a few tokens to several hundred. A prompt is taken
only if the oracle (float64) prefers each token of its answer by at least MARGIN logits, which is far above the noise
of bfloat16 arithmetic, so that an engine which answers otherwise is wrong.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

import qwen3next_plugin.demo as demo
from qwen3next_plugin.demo.batches import encode_chat
from qwen3next_plugin.demo.corpus import TURNS, Conversation, conversation
from qwen3next_plugin.demo.evaluate import open_demo
from qwen3next_plugin.reference import ReferenceModel, generate_greedy

FILE = Path(__file__).with_name("prompts.json")
CHECKPOINT = Path(demo.__file__).parent / "checkpoint"

COUNT = 50
MARGIN = 1.0
"""Logits by which the best token must lead the second best at every place of an answer."""

MAX_TOKENS = 48
LONG_TURNS = (12, 16, 20, 24, 28, 32, 36, 40, 44, 48)


@dataclass(frozen=True)
class GoldenPrompt:
    """A prompt, its greedy answer with the stop token, and the oracle's log-probability of each token of it."""

    kind: str
    prompt: list[int]
    answer: list[int]
    logprobs: list[float]
    margin: float


@dataclass(frozen=True)
class GoldenFile:
    """The whole file: for which weights it was made, and the prompts."""

    checkpoint_sha256: str
    margin: float
    stop_tokens: list[int]
    prompts: list[GoldenPrompt]


def read() -> GoldenFile:
    """The committed file."""
    content = json.loads(FILE.read_text())
    return GoldenFile(**content | {"prompts": [GoldenPrompt(**prompt) for prompt in content["prompts"]]})


def checkpoint_sha256() -> str:
    """Of the shipped weights."""
    return hashlib.sha256((CHECKPOINT / "model.safetensors").read_bytes()).hexdigest()


def conversations() -> Iterator[tuple[str, Conversation]]:
    """Held-out conversations without end: each kind of turn after one to four others, and now and then a long one."""
    rng = random.Random(50)
    kinds = list(TURNS)
    for number in range(100_000):
        if number % 5 == 4:
            chat = conversation(rng, LONG_TURNS[number // 5 % len(LONG_TURNS)], held_out=True)
        else:
            chat = conversation(rng, rng.randint(0, 4), held_out=True)
        kind = kinds[number % len(kinds)]
        chat.next_turn(kind)
        yield kind, chat


@torch.no_grad()
def score(model: ReferenceModel, prompt: list[int], answer: list[int]) -> tuple[list[int], list[float], float]:
    """One prefill of prompt and answer: the greedy choice and the answer's log-probability at each place, and the
    smallest lead of a best token."""
    rows = model(model.tokens([*prompt, *answer[:-1]]))[0, len(prompt) - 1 :].double()
    best = rows.topk(2).values
    chosen = rows.log_softmax(-1).gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1)
    return rows.argmax(-1).tolist(), chosen.tolist(), float((best[:, 0] - best[:, 1]).min())


def make() -> GoldenFile:
    """Draws conversations until COUNT of them are free of ties."""
    model, encode, stop = open_demo(CHECKPOINT, torch.float64)
    found: list[GoldenPrompt] = []
    for kind, chat in conversations():
        prompt = encode_chat(chat.messages[:-1], encode)
        (generated,) = generate_greedy(model, [prompt], MAX_TOKENS, stop)
        if generated.tokens[-1] not in stop or generated.smallest_margin < MARGIN:
            continue
        greedy, logprobs, margin = score(model, prompt, generated.tokens)
        if greedy == generated.tokens and margin >= MARGIN:
            rounded = [round(value, 6) for value in logprobs]
            found.append(GoldenPrompt(kind, prompt, generated.tokens, rounded, round(margin, 3)))
        if len(found) == COUNT:
            return GoldenFile(checkpoint_sha256(), MARGIN, sorted(stop), found)
    raise AssertionError("unreachable")


def faults(file: GoldenFile) -> Iterator[str]:
    """What is wrong with a file, a sentence each: other weights, too few prompts, an answer that is not the oracle's,
    a lead below the margin the file states."""
    if file.checkpoint_sha256 != checkpoint_sha256():
        yield "the file was made for other weights than the shipped ones"
        return
    if len(file.prompts) != COUNT:
        yield f"{len(file.prompts)} prompts instead of {COUNT}"
    model, _, stop = open_demo(CHECKPOINT, torch.float64)
    for number, golden in enumerate(file.prompts):
        greedy, logprobs, margin = score(model, golden.prompt, golden.answer)
        if greedy != golden.answer or golden.answer[-1] not in stop:
            yield f"prompt {number}: the oracle answers otherwise"
        if margin < file.margin:
            yield f"prompt {number}: a token leads by {margin:.3f} logits only, the file promises {file.margin}"
        if max(abs(a - b) for a, b in zip(logprobs, golden.logprobs, strict=True)) > 1e-4:
            yield f"prompt {number}: other log-probabilities than the oracle's"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare instead of writing")
    if parser.parse_args().check:
        wrong = list(faults(read()))
        print("\n".join(wrong) or f"{FILE.name}: {COUNT} prompts, each as the oracle answers it")
        return 1 if wrong else 0
    file = make()
    lines = ",\n  ".join(json.dumps(asdict(prompt), separators=(",", ":")) for prompt in file.prompts)
    head = asdict(file) | {"prompts": []}
    FILE.write_text(json.dumps(head)[:-2] + "\n  " + lines + "\n]}\n")
    lengths = [len(prompt.prompt) for prompt in file.prompts]
    margins = [prompt.margin for prompt in file.prompts]
    print(f"{FILE}: prompts of {min(lengths)} to {max(lengths)} tokens, smallest lead {min(margins)} logits")
    return 0


if __name__ == "__main__":
    sys.exit(main())
