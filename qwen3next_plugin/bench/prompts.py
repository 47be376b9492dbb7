"""Prompts of the measurements, and a tokenizer that turns whatever comes back into text."""

import json
import random
from pathlib import Path


def prompt_of(tokens: int, seed: str, vocab_size: int) -> list[int]:
    """Random token ids, the same for every side: they depend on ``seed`` alone. Special tokens at either end of the
    vocabulary are left out."""
    draw = random.Random(seed)  # noqa: S311
    low, high = (1000, vocab_size - 1000) if vocab_size > 4000 else (1, vocab_size * 3 // 4)
    return [draw.randrange(low, high) for _ in range(tokens)]


def give_every_token_a_text(directory: Path) -> None:
    """Adds a word for every id of config.json's vocabulary that tokenizer.json knows none for.

    Servers then turn tokens into text and send it as they do with the published tokenizer. The words cannot be typed:
    no merge leads to them.
    """
    size = json.loads((directory / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    file = directory / "tokenizer.json"
    tokenizer = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    # Special tokens too: one that the vocabulary does not hold would be numbered anew, behind the words.
    vocabulary |= {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    taken = set(vocabulary.values())
    vocabulary |= {f"Ġt{i}": i for i in range(size) if i not in taken}
    file.write_text(json.dumps(tokenizer, ensure_ascii=False), encoding="utf-8")
