"""Typed access to the fields of a config mapping: each reader checks presence, type and range."""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from .errors import ConfigError

REQUIRED: Final = object()
_SHOWN_CHARACTERS = 80


def show(value: object) -> str:
    """``repr`` cut to one short line, for messages."""
    text = repr(value)
    return text if len(text) <= _SHOWN_CHARACTERS else text[: _SHOWN_CHARACTERS - 3] + "..."


def broken(field: str, found: str, remedy: str) -> ConfigError:
    """The error for a broken field, for the caller to raise: "config.json: FIELD FOUND: REMEDY."""
    return ConfigError(f"config.json: {field} {found}: {remedy}.", field)


class Fields:
    """A mapping of config fields; ``prefix`` names the dict they stand in (``rope_parameters.``) in messages.

    A field that is absent or null takes ``default``, or is an error where none is given.
    """

    def __init__(self, values: Mapping[str, Any], prefix: str = "") -> None:
        self.values = values
        self.prefix = prefix

    def has(self, name: str) -> bool:
        """Whether the field is there and not null."""
        return self.values.get(name) is not None

    def name(self, name: str) -> str:
        """The field's full name in messages."""
        return self.prefix + name

    def _get(self, name: str, default: Any, wanted: str) -> Any:
        value = self.values.get(name)
        if value is not None:
            return value
        if default is REQUIRED:
            found = "is null" if name in self.values else "is missing"
            raise broken(self.name(name), found, f"give {wanted}")
        return default

    def integer(self, name: str, default: Any = REQUIRED, minimum: int = 1) -> int:
        """An int of at least ``minimum``; bools, floats and digits in quotes are refused."""
        wanted = f"an integer of at least {minimum}"
        value = self._get(name, default, wanted)
        if isinstance(value, bool) or not isinstance(value, int):
            raise broken(self.name(name), f"is {show(value)} ({type(value).__name__})", f"give {wanted}")
        if value < minimum:
            raise broken(self.name(name), f"is {value}", f"give {wanted}")
        return value

    def number(self, name: str, default: Any = REQUIRED, *, above: float = 0.0, at_most: float = float("inf")) -> float:
        """A finite number with ``above`` < number <= ``at_most``."""
        wanted = f"a number above {above:g}" + ("" if at_most == float("inf") else f" and at most {at_most:g}")
        value = self._get(name, default, wanted)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise broken(self.name(name), f"is {show(value)} ({type(value).__name__})", f"give {wanted}")
        if not above < value <= at_most or value == float("inf"):
            raise broken(self.name(name), f"is {value}", f"give {wanted}")
        return float(value)

    def flag(self, name: str, default: Any = REQUIRED) -> bool:
        """A bool."""
        value = self._get(name, default, "true or false")
        if not isinstance(value, bool):
            raise broken(self.name(name), f"is {show(value)} ({type(value).__name__})", "give true or false")
        return value

    def text(self, name: str, default: Any = REQUIRED, *, choices: Sequence[str] = ()) -> str:
        """A string, one of ``choices`` where some are given."""
        wanted = f"one of {', '.join(choices)}" if choices else "a string"
        value = self._get(name, default, wanted)
        if not isinstance(value, str) or (choices and value not in choices):
            raise broken(self.name(name), f"is {show(value)}", f"use {wanted}")
        return value

    def sequence(self, name: str, of: type, default: Any = REQUIRED) -> tuple[Any, ...]:
        """A list whose items are all of type ``of`` (bools do not pass for ints)."""
        wanted = f"a list of {'integers' if of is int else 'strings'}"
        value = self._get(name, default, wanted)
        if not isinstance(value, list | tuple):
            raise broken(self.name(name), f"is {show(value)} ({type(value).__name__})", f"give {wanted}")
        for item in value:
            if not isinstance(item, of) or (of is int and isinstance(item, bool)):
                raise broken(self.name(name), f"holds {show(item)}", f"give {wanted}")
        return tuple(value)

    def section(self, name: str) -> "Fields | None":
        """A nested dict as `Fields`, None where absent, null or empty."""
        value = self.values.get(name)
        if value is None or value == {}:
            return None
        if not isinstance(value, Mapping):
            raise broken(self.name(name), f"is {show(value)} ({type(value).__name__})", "give a dict, or leave it out")
        return Fields(value, f"{self.name(name)}.")
