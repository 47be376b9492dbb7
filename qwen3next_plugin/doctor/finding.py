"""What the doctor says: one finding, one line."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from .surroundings import Surroundings


class Level(StrEnum):
    """`ok` needs nothing, `warning` works but not as one might think, `error` will not work."""

    OK = "ok"
    WARNING = "warning"
    ERROR = "error"


@dataclass(frozen=True)
class Finding:
    """``check`` is the name of the check that found it, ``remedy`` what to do; empty where nothing is to be done."""

    level: Level
    check: str
    found: str
    remedy: str = ""


Check = Callable[[Surroundings], Iterator[Finding]]


def ok(check: str, found: str) -> Finding:
    """A finding that needs nothing."""
    return Finding(Level.OK, check, found)


def warning(check: str, found: str, remedy: str) -> Finding:
    """A finding to know of."""
    return Finding(Level.WARNING, check, found, remedy)


def error(check: str, found: str, remedy: str) -> Finding:
    """A finding that keeps the model from being served."""
    return Finding(Level.ERROR, check, found, remedy)


def refusal(check: str, sentence: str) -> Finding:
    """An error from one of this package's own sentences, which are "what is wrong: what would work."."""
    found, colon, remedy = sentence.strip().rpartition(": ")
    return error(check, found, remedy) if colon else error(check, sentence.strip(), "see the README's Troubleshooting")
