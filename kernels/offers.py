"""What engines have installed for an operation, beside our own kernels.

No engine is imported here. An engine's adapter offers functions and has each tried once, at its start: that builds what
is compiled at first use, and compares the results with our own kernels', so that a changed convention is found before
it serves. What was not tried for a shape, or failed, is never chosen. Which work goes where is data: tables of rules.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Generic, Protocol, TypeVar

import torch

from .dispatch import Choice

AUTO, OWN = "auto", "own"


class Named(Protocol):
    """An offer, by its name."""

    @property
    def name(self) -> str: ...


class Rule(Protocol):
    """A line of a GPU's table: who may run something."""

    @property
    def peer(self) -> str: ...


Offer = TypeVar("Offer", bound=Named)
Shape = TypeVar("Shape", bound=Hashable)
AnyRule = TypeVar("AnyRule", bound=Rule)


class Offers(Generic[Offer, Shape]):
    """The offers for one operation: what there is, for which shapes it was tried, what is missing and why, and what a
    user wants: "auto" (the table decides), "own", or an offer's name.
    """

    def __init__(self, operation: str) -> None:
        self.operation = operation
        self.found: dict[str, Offer] = {}
        self.missing: dict[str, str] = {}
        self.tried: set[tuple[str, Shape]] = set()
        self.wanted = AUTO

    def prefer(self, name: str) -> None:
        """Make ``name`` run wherever it can: "auto", "own", or what an engine offers. For a user's switch."""
        self.wanted = name

    @contextmanager
    def preferring(self, name: str) -> Iterator[None]:
        """``prefer`` for a while: for measuring."""
        before, self.wanted = self.wanted, name
        try:
            yield
        finally:
            self.wanted = before

    def offer(self, offer: Offer) -> None:
        """To be chosen once it has been tried; offering a name again replaces what it was."""
        self.found[offer.name] = offer
        self.missing.pop(offer.name, None)
        self.tried -= {entry for entry in self.tried if entry[0] == offer.name}

    def look_for(self, name: str, load: Callable[[], Offer], missing: str) -> None:
        """Offers what ``load`` imports, or notes why it cannot be had: ``missing``, and what the import said."""
        try:
            offer = load()
        except (ImportError, RuntimeError) as error:  # RuntimeError: its parts are of different versions
            self.say_missing(name, f"{missing} ({error})")
        else:
            self.offer(offer)

    def say_missing(self, name: str, why: str) -> None:
        """``name`` is not there, or no more; the activation line says so."""
        self.found.pop(name, None)
        self.missing[name] = why

    def withdraw_all(self) -> None:
        """Forget every offer and what was said of it."""
        self.found.clear()
        self.missing.clear()
        self.tried.clear()

    def candidates(self, rules: Sequence[Rule]) -> list[Offer]:
        """The offers that these rules of a GPU, or the user, could choose, by name."""
        names = {rule.peer for rule in rules} if self.wanted == AUTO else {self.wanted}
        return [self.found[name] for name in sorted(names & self.found.keys())]

    def shapes_of(self, name: str) -> list[Shape]:
        """What ``name`` was tried for with success."""
        return [shape for tried, shape in self.tried if tried == name]

    def insist(self) -> None:
        """Raise ValueError if the one that the user asked for by name is not there or failed."""
        if self.wanted not in (AUTO, OWN) and not self.shapes_of(self.wanted):
            why = self.missing.get(self.wanted, "no engine offers it")
            raise ValueError(
                f"{self.operation} by {self.wanted!r} was asked for, but it cannot be had: {why}; ask for 'auto' or "
                "'own'"
            )

    def choices(self, rules: Sequence[Rule], where: Callable[[str], str]) -> list[Choice]:
        """For the table of what runs: who takes over ``where`` (given a name), and what is missing.

        Where nothing was offered in this process, those that these rules of a GPU would have tried.
        """
        names = dict.fromkeys(rule.peer for rule in rules if rule.peer != OWN)
        if self.wanted == AUTO and not self.found and not self.missing:
            why = "where the engine has it and its trial at start succeeds"
            return [Choice(where(name), name, why) for name in names]
        choices = []
        for name in dict.fromkeys((*names, *self.found, *self.missing)):
            if self.shapes_of(name):
                choices.append(Choice(where(name), name, "the engine's, tried at its start"))
            elif name in self.missing:
                choices.append(Choice(f"no {name}", why=self.missing[name]))
        return choices


@lru_cache
def capability_of(device: torch.device) -> tuple[int, int]:
    """The GPU's compute capability; (0, 0) for a CPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def problem_of(error: Callable[[], float], most: float) -> str | None:
    """What is wrong with an offer in one clause: that running it raises, or that its ``error`` is above ``most``."""
    try:
        found = error()
    except Exception as problem:
        first_line = (str(problem).splitlines() or [""])[0]
        return f"{type(problem).__name__}: {first_line}"
    if not found <= most:
        return f"its results differ from this plugin's by {found:.2g} (relative), more than {most}"
    return None
