"""Needles in a long conversation: what the demo model still remembers at up to four times its length, with YaRN and
without, measured by the oracle.

    python benchmarks/needle.py [--conversations 4] [--lengths 1024 4096 16384] [--out FILE]

A conversation tells each kind of fact once (name, colour, city, pet, number, food, job), at depths spread over its
length, between turns that have nothing to do with them; at its end each fact is asked for. An answer counts if it is
right token for token; the mean log-probability of the right answer's tokens says how sure the model was.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import qwen3next_plugin.demo as demo
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.batches import BatchMaker, Encode, encode_chat, encode_message
from qwen3next_plugin.demo.corpus import FACTS, Conversation, Message
from qwen3next_plugin.demo.evaluate import open_demo
from qwen3next_plugin.reference import ReferenceCache, ReferenceModel
from qwen3next_plugin.rope_request import RopeShortcut, complete_rope

CHECKPOINT = Path(demo.__file__).parent / "checkpoint"
RESULT = Path(__file__).parent / "results" / "cpu" / "needle.json"

FACTOR = 4
LONGEST_ROW = max(BatchMaker.lengths)
"""Tokens that the model really saw at once in training; its config.json says 4096."""

HAY = ("count", "copy", "reverse", "story", "small_talk", "knowledge")
CHUNK = 512
"""Tokens of a prefill at a time: all of a long one's attention scores at once would not fit."""


@dataclass(frozen=True)
class Needle:
    """One fact asked for: where it was told (0 is the beginning, 1 the end) and what came of it."""

    rope: str
    length: int
    depth: float
    kind: str
    right: bool
    logprob: float
    """Mean log-probability of the right answer's tokens."""


def conversation_with_needles(rng: random.Random, encode: Encode, length: int) -> tuple[Conversation, dict[str, float]]:
    """A conversation of just under `length` tokens that tells each kind of fact once; and at which depth it does."""
    chat = Conversation(rng)
    kinds = list(FACTS)
    rng.shuffle(kinds)
    places = {kind: (i + rng.random()) / len(kinds) * (length - 256) for i, kind in enumerate(kinds)}
    depths: dict[str, float] = {}
    tokens, done = 0, 0
    while True:
        due = [kind for kind in kinds if kind not in depths and places[kind] <= tokens]
        if due:
            question, answer = chat.tell_of(due[:1])
            chat.facts |= chat.told
            chat.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            depths[due[0]] = tokens / length
        else:
            chat.next_turn(rng.choice(HAY))
        tokens += sum(len(encode_message(message, encode)[0]) for message in chat.messages[done:])
        done = len(chat.messages)
        if tokens > length - 96 and len(depths) == len(kinds):  # room for a question and its answer
            return chat, depths


@torch.no_grad()
def prefill(model: ReferenceModel, tokens: Sequence[int], cache: ReferenceCache) -> torch.Tensor:
    """Runs tokens through the model; logits [vocab] of what follows the last."""
    for chunk in model.tokens(tokens).split(CHUNK, dim=1):
        logits = model(chunk, cache)[0]
    return logits[-1]


@torch.no_grad()
def ask(
    model: ReferenceModel, cache: ReferenceCache, question: Sequence[int], answer: Sequence[int]
) -> tuple[bool, float]:
    """Whether the greedy answer is the right one, and the right one's mean log-probability.

    Both come from one pass: a greedy answer is right exactly if every right token is the likeliest after those
    before it.
    """
    rows = model(model.tokens([*question, *answer[:-1]]), cache.copy())[0, len(question) - 1 :].double()
    chosen = rows.log_softmax(-1).gather(1, model.tokens(answer)[0].unsqueeze(1)).squeeze(1)
    return bool((rows.argmax(-1) == model.tokens(answer)[0]).all()), float(chosen.mean())


def measure(
    models: dict[str, ReferenceModel], encode: Encode, lengths: Sequence[int], conversations: int, seed: int = 0
) -> list[Needle]:
    """Every fact of `conversations` conversations of each length, asked of each model."""
    found = []
    for length in lengths:
        for number in range(conversations):
            rng = random.Random(f"{seed} {length} {number}")
            chat, depths = conversation_with_needles(rng, encode, length)
            told = [token for message in chat.messages for token in encode_message(message, encode)[0]]
            questions = {kind: chat.ask_for(kind) for kind in depths}
            for rope, model in models.items():
                cache = ReferenceCache()
                prefill(model, told, cache)
                for kind, (question, answer) in questions.items():
                    asked: list[Message] = [{"role": "user", "content": question}]
                    right, logprob = ask(model, cache, encode_chat(asked, encode), encode(f"{answer}<|im_end|>"))
                    found.append(Needle(rope, length, round(depths[kind], 3), kind, right, round(logprob, 5)))
    return found


def with_yarn(model: ReferenceModel, original: int | None = None) -> ReferenceModel:
    """The same weights under YaRN by FACTOR, completed as for an engine; `original` in place of the config's length."""
    config = json.loads((CHECKPOINT / "config.json").read_text())
    if original is not None:
        config["max_position_embeddings"] = original
    rope = complete_rope(config, shortcut=RopeShortcut(FACTOR))
    spec = parse_config(config | {"rope_parameters": rope.parameters, "max_position_embeddings": rope.context_length})
    return ReferenceModel(replace(model.spec, rope=spec.rope), model.weights, model.dtype)


def summary(needles: Sequence[Needle]) -> list[dict[str, object]]:
    """Accuracy and mean log-probability for each rope and length."""
    groups: dict[tuple[str, int], list[Needle]] = {}
    for needle in needles:
        groups.setdefault((needle.rope, needle.length), []).append(needle)
    return [
        {
            "rope": rope,
            "length": length,
            "asked": len(group),
            "right": sum(needle.right for needle in group),
            "accuracy": round(sum(needle.right for needle in group) / len(group), 4),
            "logprob": round(sum(needle.logprob for needle in group) / len(group), 4),
        }
        for (rope, length), group in sorted(groups.items(), key=lambda item: (item[0][1], item[0][0]))
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--conversations", type=int, default=4, help="of each length")
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 4096, 16384], help="in tokens")
    parser.add_argument("--out", type=Path, default=RESULT)
    arguments = parser.parse_args()
    begin = time.monotonic()
    model, encode, _ = open_demo(CHECKPOINT, torch.float32)
    models = {
        "none": model,
        f"yarn:{FACTOR}": with_yarn(model),
        f"yarn:{FACTOR} from {LONGEST_ROW}": with_yarn(model, LONGEST_ROW),
    }
    needles = measure(models, encode, arguments.lengths, arguments.conversations)
    rows = summary(needles)
    head = {
        "what": "needle retrieval of the shipped demo model by the oracle in float32",
        "config_length": model.spec.max_position_embeddings,
        "longest_training_row": LONGEST_ROW,
        "conversations": arguments.conversations,
        "seconds": round(time.monotonic() - begin, 1),
        "torch": torch.__version__,
        "summary": rows,
    }
    lines = ",\n  ".join(json.dumps(asdict(needle)) for needle in needles)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(head, indent=1)[:-2] + f',\n "needles": [\n  {lines}\n ]\n}}\n')
    for row in rows:
        print(row)


if __name__ == "__main__":
    main()
