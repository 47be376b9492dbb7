"""What was measured so far: one JSON line a measurement, written before the next one begins.

A process that is killed loses the measurement it was at, and a line it had half written is cut off by the next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from qwen3next_plugin.errors import SettingsError

FORMAT = 1

P = TypeVar("P", bound=Hashable)
C = TypeVar("C", bound=Hashable)


@dataclass(frozen=True)
class Form(Generic[P, C]):
    """How a file holds what is measured: places (numbers of tokens, shapes), in the field ``place``, and configs.

    What cannot be parsed raises KeyError, TypeError or ValueError.
    """

    place: str
    place_object: Callable[[P], Any]
    parse_place: Callable[[Any], P]
    config_object: Callable[[C], Any]
    parse_config: Callable[[Any], C]


class State(Generic[P, C]):
    """Times, errors and reasons by place and config, and the config that ran before the tuning.

    ``identity`` says what measurements must share to be compared: GPU, problem, versions. Raises SettingsError, one
    sentence, for a file of another identity or one that is no such file.
    """

    def __init__(self, path: Path, identity: dict[str, Any], machine: str, form: Form[P, C]) -> None:
        self.path = path
        self.form = form
        self.machine = machine
        self.seconds: dict[tuple[P, C], float] = {}
        self.errors: dict[tuple[P, C], float] = {}
        self.notes: dict[tuple[P, C], str] = {}
        self.before: dict[P, C] = {}
        self.machines: dict[P, set[str]] = {}
        try:
            lines = list(self._whole_lines())
        except OSError as error:
            raise SettingsError(f"{path} cannot be read ({error.strerror}): give another --state.") from None
        if not lines:
            self._write({"format": FORMAT, "identity": identity})
            return
        try:
            head, *rest = [json.loads(line) for line in lines]
            found, number = head["identity"], head["format"]
            for line in rest:
                self._take(line)
        except (ValueError, KeyError, TypeError):
            raise SettingsError(f"{path} is not a state file of `qwen3next tune`: give another --state.") from None
        if number != FORMAT:
            raise SettingsError(f"{path} has format {number}, this version reads {FORMAT}: give another --state.")
        for key in (*identity, *found):
            if found.get(key) != identity.get(key):
                raise SettingsError(
                    f"{path} holds measurements of another {key} ({_short(found.get(key))}; here it is "
                    f"{_short(identity.get(key))}): give another --state."
                )

    def _whole_lines(self) -> Iterator[str]:
        """The file's lines; a last one that was not finished is removed."""
        if not self.path.exists():
            return
        content = self.path.read_bytes()
        end = content.rfind(b"\n") + 1
        if end < len(content):
            with self.path.open("r+b") as file:
                file.truncate(end)
        yield from content[:end].decode(errors="replace").splitlines()

    def _take(self, line: dict[str, Any]) -> None:
        place, config = self.form.parse_place(line[self.form.place]), self.form.parse_config(line["config"])
        if line["what"] == "seconds":
            self.seconds[place, config] = math.inf if line["value"] is None else float(line["value"])
            self.machines.setdefault(place, set()).add(line["machine"])
        elif line["what"] == "error":
            self.errors[place, config] = math.inf if line["value"] is None else float(line["value"])
        elif line["what"] == "before":
            self.before[place] = config
        else:
            raise KeyError(line["what"])
        if "note" in line:
            self.notes[place, config] = line["note"]

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SettingsError(f"{self.path} cannot be written ({error.strerror}): give another --state.") from None

    def add(self, what: str, place: P, config: C, value: float | None = None, note: str = "") -> None:
        """Keeps one finding: "before" (no value), "seconds" or "error"; infinite for a config that does not work."""
        line: dict[str, Any] = {
            "what": what,
            self.form.place: self.form.place_object(place),
            "config": self.form.config_object(config),
        }
        if value is not None:
            line |= {"value": value if math.isfinite(value) else None, "machine": self.machine}
        else:
            line |= {"value": None}
        line |= {"note": note} if note else {}
        self._write(line)
        self._take(line)


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
