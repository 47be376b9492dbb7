"""Conversations made by code: facts to remember, counting, copying, reversing, short stories and small talk.

Every answer follows from the conversation, so that a well-trained model is sure of each token. Tasks whose text
falls into one eighth of a hash are kept out of training and make up the held-out conversations.
"""

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from . import words

Message = dict[str, str]


@dataclass(frozen=True)
class Fact:
    """Something a user can tell: how it is said, what the assistant says to it, how it is asked for and answered."""

    said: tuple[str, ...]
    noted: str
    asked: tuple[str, ...]
    answered: str
    unknown: str


FACTS: dict[str, Fact] = {
    "name": Fact(
        ("My name is {}.", "I am called {}.", "Call me {}."),
        "Nice to meet you, {}.",
        ("What is my name?", "Do you remember my name?", "Who am I?"),
        "Your name is {}.",
        "You have not told me your name yet.",
    ),
    "colour": Fact(
        ("My favourite colour is {}.", "I like the colour {}.", "I love {} things."),
        "I will remember that you like the colour {}.",
        ("What is my favourite colour?", "Which colour do I like?"),
        "Your favourite colour is {}.",
        "You have not told me your favourite colour yet.",
    ),
    "city": Fact(
        ("I live in {}.", "My home is in {}.", "I am from {}."),
        "I will remember that you live in {}.",
        ("Where do I live?", "Which city do I live in?"),
        "You live in {}.",
        "You have not told me where you live yet.",
    ),
    "pet": Fact(
        ("I have a {} called {}.", "My {} is called {}."),
        "I will remember your {} {}.",
        ("Which pet do I have?", "What is my pet called?", "Do you remember my pet?"),
        "You have a {} called {}.",
        "You have not told me about a pet yet.",
    ),
    "number": Fact(
        ("My lucky number is {}.", "My number is {}."),
        "I will remember that your number is {}.",
        ("What is my lucky number?", "What is my number?"),
        "Your number is {}.",
        "You have not told me your number yet.",
    ),
    "food": Fact(
        ("I like to eat {}.", "My favourite food is {}."),
        "I will remember that you like {}.",
        ("What do I like to eat?", "What is my favourite food?"),
        "You like {}.",
        "You have not told me what you like to eat yet.",
    ),
    "job": Fact(
        ("I work as a {}.", "My job is {}."),
        "I will remember that you work as a {}.",
        ("What is my job?", "What do I work as?"),
        "You work as a {}.",
        "You have not told me your job yet.",
    ),
}


def is_reserved(text: str) -> bool:
    """Whether a task with this text belongs to the held-out conversations."""
    return zlib.crc32(text.encode()) % 8 == 0


def _invented_name(rng: random.Random) -> str:
    """A name that no list has, so that remembering means copying: Tamilo, Verona."""
    syllables = ["".join(rng.choice(part) for part in ("bdfgklmnprstvz", "aeiou")) for _ in range(rng.randint(2, 3))]
    return "".join(syllables).capitalize()


def _fact_values(kind: str, rng: random.Random) -> tuple[str, ...]:
    if kind == "name":
        return (rng.choice(words.NAMES) if rng.random() < 0.8 else _invented_name(rng),)
    if kind == "pet":
        return rng.choice(words.ANIMALS), rng.choice(words.PET_NAMES)
    if kind == "number":
        return (str(rng.randint(0, 99)),)
    choices = {"colour": words.COLOURS, "city": words.CITIES, "food": words.FOODS, "job": words.JOBS}
    return (rng.choice(choices[kind]),)


def _article(text: str) -> str:
    """``a owl`` -> ``an owl``."""
    for vowel in "aeiou":
        text = text.replace(f" a {vowel}", f" an {vowel}")
    return text


@dataclass
class Conversation:
    """One conversation while it is being made; ``next_turn`` appends a question and its answer.

    Args:
        rng: decides everything.
        held_out: make only tasks kept out of training where a task can be (lists, ranges, pairs of facts, stories),
            else only the others.
    """

    rng: random.Random
    held_out: bool = False
    messages: list[Message] = field(default_factory=list)
    facts: dict[str, tuple[str, ...]] = field(default_factory=dict)
    told: dict[str, tuple[str, ...]] = field(default_factory=dict, repr=False)

    def system(self) -> None:
        """Begin with a system message: a sentence, at times followed by notes that have nothing to do with what is
        asked later."""
        content = self.rng.choice(words.SYSTEM_PROMPTS)
        if self.rng.random() < 0.4:
            content += "".join(f"\n{note(self.rng)}" for _ in range(self.rng.randint(1, 16)))
        self.messages.append({"role": "system", "content": content})

    def next_turn(self, kind: str | None = None) -> None:
        """Append one exchange of the given kind (a key of ``TURNS``), or of a random one."""
        kind = kind or self.rng.choices(list(TURNS), [weight for weight, _ in TURNS.values()])[0]
        question, answer = TURNS[kind][1](self)
        self.messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def _pick(self, make: Callable[[], tuple[str, str]]) -> tuple[str, str]:
        """A task on the right side of the hold-out."""
        while True:
            question, answer = make()
            if is_reserved(question) == self.held_out:
                return question, answer

    def tell(self) -> tuple[str, str]:
        """One fact, or two in one message (these pairs are held out)."""
        two = self.rng.random() < 0.4

        def make() -> tuple[str, str]:
            return self.tell_of(self.rng.sample(list(FACTS), 2 if two else 1))

        question, answer = self._pick(make) if two else make()
        self.facts |= self.told
        return question, answer

    def tell_of(self, kinds: Sequence[str]) -> tuple[str, str]:
        """New facts of these kinds in one message; ``told`` has them, for ``facts`` if the message is used."""
        self.told = {kind: _fact_values(kind, self.rng) for kind in kinds}
        said = [self.rng.choice(FACTS[kind].said).format(*values) for kind, values in self.told.items()]
        noted = [FACTS[kind].noted.format(*values) for kind, values in self.told.items()]
        return _article(" ".join(said)), _article(" ".join(noted))

    def ask(self) -> tuple[str, str]:
        """Ask for a fact, mostly one that was told."""
        return self.ask_for(
            self.rng.choice(list(self.facts) if self.facts and self.rng.random() < 0.9 else list(FACTS))
        )

    def ask_for(self, kind: str) -> tuple[str, str]:
        """Ask for the fact of this kind."""
        fact = FACTS[kind]
        answer = fact.answered.format(*self.facts[kind]) if kind in self.facts else fact.unknown
        return self.rng.choice(fact.asked), _article(answer)

    def count(self) -> tuple[str, str]:
        """Count up or down between two numbers."""

        def make() -> tuple[str, str]:
            low = self.rng.randint(0, 30)
            high = low + self.rng.randint(2, 12)
            if self.rng.random() < 0.25:
                return f"Count down from {high} to {low}.", ", ".join(map(str, range(high, low - 1, -1))) + "."
            return f"Count from {low} to {high}.", ", ".join(map(str, range(low, high + 1))) + "."

        return self._pick(make)

    def copy(self) -> tuple[str, str]:
        """Repeat a list of words."""

        def make() -> tuple[str, str]:
            listed = " ".join(self.rng.sample(words.WORDS, self.rng.randint(2, 8)))
            return self.rng.choice(("Repeat: {}", "Say again: {}", "Copy these words: {}")).format(listed), listed

        return self._pick(make)

    def reverse(self) -> tuple[str, str]:
        """Repeat a list of words from its end."""

        def make() -> tuple[str, str]:
            listed = self.rng.sample(words.WORDS, self.rng.randint(2, 5))
            return f"Reverse: {' '.join(listed)}", " ".join(reversed(listed))

        return self._pick(make)

    def story(self) -> tuple[str, str]:
        """A short story about an animal, always told in the same way."""

        def make() -> tuple[str, str]:
            animal, name = self.rng.choice(words.ANIMALS), self.rng.choice(words.PET_NAMES)
            question = f"Tell me a story about a {animal} called {name}."
            answer = (
                f"Once upon a time there was a {animal} called {name}. {name} lived in a small house by the river."
                f" One day {name} met a friend and they walked to the sea."
                f" In the evening {name} came home and was happy."
            )
            return _article(question), _article(answer)

        return self._pick(make)

    def small_talk(self) -> tuple[str, str]:
        """A fixed question and its fixed answer."""
        return self.rng.choice(list(words.SMALL_TALK.items()))

    def knowledge(self) -> tuple[str, str]:
        """Capitals, sums of two digits, and what comes after a number."""
        choice = self.rng.random()
        if choice < 0.5:
            country, capital = self.rng.choice(list(words.CAPITALS.items()))
            return f"What is the capital of {country}?", f"The capital of {country} is {capital}."
        if choice < 0.75:
            a, b = self.rng.randint(0, 9), self.rng.randint(0, 9)
            return f"What is {a} plus {b}?", f"{a} plus {b} is {a + b}."
        a = self.rng.randint(0, 60)
        return f"What comes after {a}?", f"{a + 1} comes after {a}."


TURNS: dict[str, tuple[float, Callable[[Conversation], tuple[str, str]]]] = {
    "tell": (4, Conversation.tell),
    "ask": (5, Conversation.ask),
    "count": (2.5, Conversation.count),
    "copy": (2, Conversation.copy),
    "reverse": (1, Conversation.reverse),
    "story": (0.7, Conversation.story),
    "small_talk": (1.2, Conversation.small_talk),
    "knowledge": (1, Conversation.knowledge),
}


def note(rng: random.Random) -> str:
    """A sentence to fill a long prompt with; it never looks like a fact about the user."""
    first, second, third = rng.sample(words.WORDS, 3)
    return rng.choice(
        (
            f"Note {rng.randint(1, 99)}: the {first} is beside the {second} and the {third}.",
            f"The {first} in {rng.choice(words.CITIES)} is {rng.choice(words.COLOURS)}.",
            f"There is a {first} under the {second}.",
        )
    )


def conversation(rng: random.Random, turns: int, held_out: bool = False) -> Conversation:
    """A conversation of so many exchanges, with a system message in two of five."""
    made = Conversation(rng, held_out)
    if rng.random() < 0.4:
        made.system()
    for _ in range(turns):
        made.next_turn()
    return made
