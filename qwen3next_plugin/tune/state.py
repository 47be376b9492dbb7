"""What was measured so far: one JSON line a measurement, written before the next one begins.

A process that is killed loses the measurement it was at, and a line it had half written is cut off by the next one.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.moe.config import MoeConfig, config_object, parse_config

FORMAT = 1
Key = tuple[int, MoeConfig]


class State:
    """Times, errors and reasons by number of tokens and config, and the config that ran before the tuning.

    ``identity`` says what measurements must share to be compared: GPU, problem, versions. Raises SettingsError, one
    sentence, for a file of another identity or one that is no such file.
    """

    def __init__(self, path: Path, identity: dict[str, Any], machine: str) -> None:
        self.path = path
        self.machine = machine
        self.seconds: dict[Key, float] = {}
        self.errors: dict[Key, float] = {}
        self.notes: dict[Key, str] = {}
        self.before: dict[int, MoeConfig] = {}
        self.machines: dict[int, set[str]] = {}
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
        tokens, config = int(line["tokens"]), parse_config(line["config"])
        if line["what"] == "seconds":
            self.seconds[tokens, config] = math.inf if line["value"] is None else float(line["value"])
            self.machines.setdefault(tokens, set()).add(line["machine"])
        elif line["what"] == "error":
            self.errors[tokens, config] = math.inf if line["value"] is None else float(line["value"])
        elif line["what"] == "before":
            self.before[tokens] = config
        else:
            raise KeyError(line["what"])
        if "note" in line:
            self.notes[tokens, config] = line["note"]

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                file.write(json.dumps(line).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise SettingsError(f"{self.path} cannot be written ({error.strerror}): give another --state.") from None

    def add(self, what: str, tokens: int, config: MoeConfig, value: float | None = None, note: str = "") -> None:
        """Keeps one finding: "before" (no value), "seconds" or "error"; infinite for a config that does not work."""
        line: dict[str, Any] = {"what": what, "tokens": tokens, "config": config_object(config)}
        if value is not None:
            line |= {"value": value if math.isfinite(value) else None, "machine": self.machine}
        else:
            line |= {"value": None}
        line |= {"note": note} if note else {}
        self._write(line)
        self._take(line)


def _short(value: Any) -> str:
    return ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else str(value)
