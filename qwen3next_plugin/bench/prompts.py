"""Prompts of the measurements."""

import random


def prompt_of(tokens: int, seed: str, vocab_size: int) -> list[int]:
    """Random token ids, the same for every side: they depend on ``seed`` alone. Special tokens at either end of the
    vocabulary are left out."""
    draw = random.Random(seed)  # noqa: S311
    low, high = (1000, vocab_size - 1000) if vocab_size > 4000 else (1, vocab_size * 3 // 4)
    return [draw.randrange(low, high) for _ in range(tokens)]
