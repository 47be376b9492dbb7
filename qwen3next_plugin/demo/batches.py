"""Conversations as rows of tokens for training."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from .corpus import Conversation, Message, conversation

Encode = Callable[[str], list[int]]


@dataclass(frozen=True)
class Batch:
    """``tokens [B, N]`` and which of them the assistant says, ``answers [B, N]`` bool; every row begins a
    conversation."""

    tokens: Tensor
    answers: Tensor

    def to(self, device: str) -> "Batch":
        """The batch on ``device``."""
        return Batch(self.tokens.to(device), self.answers.to(device))


def encode_message(message: Message, encode: Encode) -> tuple[list[int], list[bool]]:
    """One message as the chat template renders it, and which of its tokens the assistant has to say.

    Special tokens and the line break keep the parts apart, so encoding them one by one gives what encoding the whole
    conversation does.
    """
    head = encode(f"<|im_start|>{message['role']}\n")
    body = encode(f"{message['content']}<|im_end|>")
    tail = encode("\n")
    said = message["role"] == "assistant"
    return head + body + tail, [False] * len(head) + [said] * len(body) + [False] * len(tail)


def encode_chat(messages: list[Message], encode: Encode) -> list[int]:
    """A conversation as the prompt for its next answer: what the chat template gives with ``add_generation_prompt``."""
    ids = [token for message in messages for token in encode_message(message, encode)[0]]
    return ids + encode("<|im_start|>assistant\n")


class BatchMaker:
    """Endless batches of conversations that are exactly as long as a row, so that nothing is padded.

    Args:
        encode: text, special tokens included, to token ids.
        tokens_per_batch: rows times row length, about.
        lookahead: tokens a row has beyond its length, as targets of the furthest draft.
        seed: of the conversations.
    """

    lengths = (64, 128, 256, 512, 1024)
    first_shares = (0.50, 0.40, 0.10, 0.00, 0.00)
    last_shares = (0.10, 0.30, 0.36, 0.20, 0.04)

    def __init__(self, encode: Encode, tokens_per_batch: int, lookahead: int, seed: int) -> None:
        self.encode = lru_cache(maxsize=65536)(encode)
        self.tokens_per_batch = tokens_per_batch
        self.lookahead = lookahead
        self.rng = random.Random(seed)

    def __call__(self, progress: float = 1.0) -> Batch:
        """The next batch; rows grow from short to long as ``progress`` goes from 0 to 1."""
        mixed = [(1 - progress) * a + progress * b for a, b in zip(self.first_shares, self.last_shares, strict=True)]
        length = self.rng.choices(self.lengths, mixed)[0]
        rows = [self._row(length + self.lookahead) for _ in range(max(1, self.tokens_per_batch // length))]
        tokens, answers = zip(*rows, strict=True)
        return Batch(torch.tensor(tokens), torch.tensor(answers))

    def _row(self, length: int) -> tuple[list[int], list[bool]]:
        chat: Conversation = conversation(self.rng, 1)
        tokens: list[int] = []
        answers: list[bool] = []
        done = 0
        while len(tokens) < length:
            if done == len(chat.messages):
                chat.next_turn()
            ids, said = encode_message(chat.messages[done], self.encode)
            tokens += ids
            answers += said
            done += 1
        return tokens[:length], answers[:length]
