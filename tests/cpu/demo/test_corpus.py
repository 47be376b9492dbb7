"""The corpus: answers follow from what was said, and what is held out is never trained on."""

import random
import re

import pytest

from qwen3next_plugin.demo import words
from qwen3next_plugin.demo.batches import BatchMaker
from qwen3next_plugin.demo.corpus import FACTS, TURNS, Conversation, conversation, is_reserved, note


def turns(held_out: bool, kind: str, count: int = 200) -> list[tuple[str, str]]:
    made = Conversation(random.Random(1), held_out)
    for _ in range(count):
        made.next_turn(kind)
    contents = [m["content"] for m in made.messages]
    return list(zip(contents[::2], contents[1::2], strict=True))


def test_the_seed_decides_everything() -> None:
    first, second = (conversation(random.Random(7), 6).messages for _ in range(2))
    assert first == second != conversation(random.Random(8), 6).messages


@pytest.mark.parametrize("kind", ["count", "copy", "reverse", "story"])
def test_held_out_tasks_are_never_trained_on(kind: str) -> None:
    trained, held_out = ({q for q, _ in turns(side, kind)} for side in (False, True))
    assert not trained & held_out
    assert all(is_reserved(q) for q in held_out) and not any(is_reserved(q) for q in trained)


@pytest.mark.parametrize("held_out", [False, True])
def test_counting_copying_and_reversing_are_right(held_out: bool) -> None:
    for question, answer in turns(held_out, "count"):
        first, last = map(int, re.findall(r"\d+", question))
        assert [int(n) for n in re.findall(r"\d+", answer)] == [
            *range(first, last + (1 if last > first else -1), 1 if last > first else -1)
        ]
    for question, answer in turns(held_out, "copy"):
        assert question.endswith(f": {answer}")
    for question, answer in turns(held_out, "reverse"):
        assert question.removeprefix("Reverse: ").split() == answer.split()[::-1]


def test_asked_facts_are_those_told_last() -> None:
    rng = random.Random(3)
    for _ in range(100):
        chat = Conversation(rng)
        for kind in ("tell", "tell", "ask", "tell", "ask"):
            chat.next_turn(kind)
        answer = chat.messages[-1]["content"]
        right = [
            fact.answered.format(*chat.facts[kind]) if kind in chat.facts else fact.unknown
            for kind, fact in FACTS.items()
        ]
        assert answer in [re.sub(r" a (?=[aeiou])", " an ", text) for text in right]


def test_every_kind_of_turn_alternates_user_and_assistant() -> None:
    chat = Conversation(random.Random(0))
    chat.system()
    for kind in TURNS:
        chat.next_turn(kind)
    roles = [m["role"] for m in chat.messages]
    assert roles == ["system", *["user", "assistant"] * len(TURNS)]
    assert all(m["content"] and m["content"] == m["content"].strip() for m in chat.messages)


def test_notes_say_nothing_about_the_user() -> None:
    said = [note(random.Random(n)) for n in range(200)]
    assert not [text for text in said if re.search(r"\b(I|my|you)\b", text, re.IGNORECASE)]


def test_words_are_unique() -> None:
    for words_of in (words.NAMES, words.COLOURS, words.CITIES, words.ANIMALS, words.PET_NAMES, words.FOODS, words.JOBS):
        assert len(set(words_of)) == len(words_of)
    assert len(set(words.WORDS)) == len(words.WORDS)


@pytest.mark.parametrize("progress", [0.0, 1.0])
def test_rows_are_full_and_answers_marked(progress: float) -> None:
    def encode(text: str) -> list[int]:
        return list(text.encode())

    maker = BatchMaker(encode, 512, 4, seed=5)
    for _ in range(10):
        batch = maker(progress)
        assert batch.tokens.shape == batch.answers.shape
        assert batch.tokens.shape[1] - 4 in maker.lengths
        for tokens, answers in zip(batch.tokens.tolist(), batch.answers.tolist(), strict=True):
            text = bytes(tokens).decode()
            assert text.startswith(("<|im_start|>user\n", "<|im_start|>system\n"))
            marked = bytes(t for t, answer in zip(tokens, answers, strict=True) if answer).decode()
            complete = re.findall(r"<\|im_start\|>assistant\n(.*?<\|im_end\|>)", text, re.DOTALL)
            assert marked.startswith("".join(complete))
