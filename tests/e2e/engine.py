"""Which engine these tests run on: the one installed beside pytest. What differs between engines is said here.

A test says what it wants as a `Setup`; the engine's description turns it into flags, starts servers and reads answers.
Where engines differ in meaning (how far an answer may reach, what a strategy is called) the description says so too.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from .server import Server

TOP_LOGPROBS = 20


class RefusedError(Exception):
    """The server answered that it will not do this (HTTP 400)."""


@dataclass(frozen=True)
class Setup:
    """A small server: `num_drafts` MTP drafts a step, `cache` the engine's name for a way to cache prefixes or "".

    `eager` leaves torch.compile out where an engine has it, which costs most of a start.
    """

    shape: str = "ratio2"
    num_drafts: int = 0
    cache: str = ""
    max_model_len: int = 512
    dtype: str = "float32"
    eager: bool = True
    further: bool = False
    """Whether a second version of an engine gets it in `make test` (in its short selection, `pytest -m quick`), and not
    the first, which has another setup for the same."""

    def __str__(self) -> str:
        return (
            f"{self.shape}-mtp{self.num_drafts}" + f"-{self.cache}" * bool(self.cache) + "-compiled" * (not self.eager)
        )


@dataclass
class Completion:
    """One answer: its tokens, their log-probabilities, the likeliest alternatives at each place, and cached tokens."""

    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[dict[int, float]]
    cached_tokens: int
    finish_reason: str
    prompt_logprobs: list[dict[int, float]] = field(default_factory=list)


@dataclass
class Chat:
    """A chat answer and the tokens of the prompt that the engine made of the messages."""

    text: str
    prompt: list[int]
    tokens: list[int]
    cached_tokens: int


class Counts:
    """What an engine tells only answer by answer, summed up over a server's life."""

    def __init__(self) -> None:
        self._counts: dict[str, float] = {}
        self._lock = threading.Lock()

    def add(self, name: str, value: float) -> None:
        with self._lock:
            self._counts[name] = self._counts.get(name, 0.0) + value

    def __getitem__(self, name: str) -> float:
        return self._counts.get(name, 0.0)


class Engine(ABC):
    """One engine as the tests see it."""

    name: ClassVar[str]
    caches: ClassVar[tuple[str, ...]]
    """Its ways to cache prefixes, the default one first."""

    prompt_reserve: ClassVar[int]
    """By how much the longest prompt stays below the context length."""

    inherited: ClassVar[tuple[str, ...]]
    """Prefixes of variables that steer it and are not inherited from whoever runs the tests."""

    stock_sign: ClassVar[str]
    """What only the stock engine logs."""

    usual: ClassVar[dict[str, str]]
    """Variables that undo what `variables` does for exactness."""

    length_flag: ClassVar[str]
    """Its flag for the longest context."""

    version_change: ClassVar[tuple[str, str, str]]
    """A module of it, a text there, and the text instead of it that makes it version 0.99.0."""

    drift: ClassVar[tuple[str, str, str]]
    """The same for something that this plugin relies on and finds under another name; the old text names it."""

    random_setups: ClassVar[tuple[Setup, ...]]
    demo_setups: ClassVar[tuple[Setup, ...]]
    limit_setups: ClassVar[tuple[Setup, ...]]
    state_setups: ClassVar[tuple[Setup, ...]]
    """What the modules of these names serve; together every way to cache with every number of drafts."""

    @property
    def cache(self) -> str:
        """The default way to cache prefixes."""
        return self.caches[0]

    @abstractmethod
    def command(self, model: str, port: int) -> list[str]:
        """The command line of a server, without further flags."""

    @abstractmethod
    def context_reserve(self, num_drafts: int) -> int:
        """By how much the longest prompt and answer together stay below the context length."""

    @abstractmethod
    def flags(self, setup: Setup) -> list[str]:
        """The flags of a small server."""

    @abstractmethod
    def variables(self) -> dict[str, str]:
        """Environment of its processes, beside what all engines get; PYTHONPATH here is put before the inherited."""

    @abstractmethod
    def complete(
        self,
        server: Server,
        prompt: Sequence[int],
        max_tokens: int,
        *,
        temperature: float,
        seed: int | None,
        score_prompt: bool,
        ignore_eos: bool,
    ) -> Completion:
        """An answer to a prompt of token ids over HTTP, with the 20 likeliest tokens of each place."""

    @abstractmethod
    def chat(self, server: Server, messages: list[Any], max_tokens: int, ignore_eos: bool) -> Chat:
        """A greedy answer of /v1/chat/completions."""

    @abstractmethod
    def forget(self, server: Server) -> None:
        """Empties the prefix cache where scoring a prompt would read it."""

    @abstractmethod
    def acceptance(self, server: Server) -> tuple[float, float]:
        """(draft tokens, accepted ones) since the server's start."""

    @abstractmethod
    def preemptions(self, server: Server) -> float:
        """How often a running request was thrown out to make room, since the server's start."""

    @abstractmethod
    def small_pool(self) -> list[str]:
        """Flags of a cache that cannot hold eight conversations of 160 tokens at once."""

    @abstractmethod
    def inside(self, setup: Setup, tight: bool = False) -> dict[str, Any]:
        """Arguments of an engine of `inside.py`; `tight` gives it a cache that cannot hold four requests of 200
        tokens at once."""

    @abstractmethod
    def override(self, changes: dict[str, Any]) -> list[str]:
        """Flags that put `changes` over the checkpoint's config.json."""

    @abstractmethod
    def two_ranks(self) -> tuple[list[str], dict[str, str]]:
        """Flags and variables that split the model over two processes."""
