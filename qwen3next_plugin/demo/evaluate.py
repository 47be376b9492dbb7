"""What the demo model can do, measured by the oracle on conversations that were kept out of training."""

import random
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from qwen3next_plugin.reference import DraftStatistics, ReferenceModel, accept_drafts, generate_greedy

from .batches import Encode, encode_chat
from .corpus import TURNS, Conversation, conversation


@dataclass
class Evaluation:
    """Right answers and their number for each kind of turn, drafts by depth, and the answers' closest decision."""

    right: dict[str, int]
    asked: dict[str, int]
    drafts: DraftStatistics
    margins: list[float] = field(default_factory=list)
    mistakes: list[tuple[str, str, list[int]]] = field(default_factory=list)  # question, right answer, what was said

    @property
    def accuracy(self) -> float:
        """Share of all answers that are right, token for token."""
        return sum(self.right.values()) / max(1, sum(self.asked.values()))

    def accuracy_of(self, kind: str) -> float:
        """Share of the answers of one kind of turn that are right."""
        return self.right[kind] / max(1, self.asked[kind])


def held_out_chats(seed: int, per_kind: int) -> list[tuple[str, Conversation]]:
    """Held-out conversations of two to five exchanges; the last one is of the given kind, ``per_kind`` of each."""
    rng = random.Random(seed)
    chats = []
    for kind in TURNS:
        for _ in range(per_kind):
            chat = conversation(rng, rng.randint(1, 4), held_out=True)
            chat.next_turn(kind)
            chats.append((kind, chat))
    return chats


def evaluate(
    model: ReferenceModel,
    encode: Encode,
    stop_tokens: Collection[int],
    *,
    seed: int = 1_000_003,
    per_kind: int = 8,
    depth: int = 3,
) -> Evaluation:
    """Let the model give the last answer of each held-out conversation, greedily, and draft it with its MTP head."""
    counts = dict.fromkeys(TURNS, 0)
    result = Evaluation(dict(counts), dict(counts), DraftStatistics.empty(depth))
    for kind, chat in held_out_chats(seed, per_kind):
        prompt = encode_chat(chat.messages[:-1], encode)
        wanted = encode(chat.messages[-1]["content"] + "<|im_end|>")
        answer = generate_greedy(model, [prompt], len(wanted) + 8, stop_tokens)[0]
        result.asked[kind] += 1
        result.right[kind] += answer.tokens == wanted
        if answer.tokens != wanted:
            result.mistakes.append((chat.messages[-2]["content"], chat.messages[-1]["content"], answer.tokens))
        result.margins.append(answer.smallest_margin)
        result.drafts.add(accept_drafts(model, prompt, answer.tokens, depth))
    return result


def open_demo(directory: Path, dtype: torch.dtype = torch.float32) -> tuple[ReferenceModel, Encode, set[int]]:
    """The oracle, the tokenizer's encoder and the stop tokens of a checkpoint; needs the ``tokenizers`` library."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    vocabulary = tokenizer.get_vocab()
    stop = {vocabulary[token] for token in ("<|im_end|>", "<|endoftext|>")}
    model = ReferenceModel.from_checkpoint(directory, dtype)
    return model, lambda text: tokenizer.encode(text, add_special_tokens=False).ids, stop


def figures_of(directory: Path, per_kind: int = 25) -> dict[str, Any]:
    """The figures of a finished checkpoint for its result file: accuracy by kind, acceptance by depth, closest
    decisions."""
    model, encode, stop = open_demo(directory)
    result = evaluate(model, encode, stop, per_kind=per_kind)
    margins = sorted(result.margins)
    return {
        "parameters": sum(w.numel() for w in model.weights.values()),
        "answers": sum(result.asked.values()),
        "accuracy": round(result.accuracy, 4),
        "accuracy_by_kind": {kind: round(result.accuracy_of(kind), 4) for kind in result.asked},
        "drafted_by_depth": result.drafts.drafted,
        "accepted_by_depth": result.drafts.accepted,
        "acceptance_by_depth": [round(rate, 4) for rate in result.drafts.rates],
        "acceptance_length": round(result.drafts.acceptance_length, 3),
        "margin_smallest": round(margins[0], 3),
        "margin_lowest_tenth": round(margins[len(margins) // 10], 3),
        "margin_median": round(margins[len(margins) // 2], 3),
    }
