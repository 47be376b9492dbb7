"""What one engine's run has measured so far, on disk after every implementation of every case.

A process that dies (a kernel that writes where it must not takes the GPU's context with it) leaves in the file what it
was at; the run that is taken up passes that by and says so in the row.
"""

import json
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError

FORMAT = 1
DIED = "the process ended while it ran"


class PartState:
    """``{"format", "kind", "engine", "plan", "machine", "about", "rows": {case: row}, "attempt": [case, series]}``."""

    def __init__(self, path: Path, plan: dict[str, Any], machine: str) -> None:
        """Takes up what is at ``path``. Raises SettingsError if that is of another plan or machine."""
        self.path = path
        self.data: dict[str, Any] = {"format": FORMAT, **plan, "machine": machine, "rows": {}, "attempt": None}
        if not path.exists():
            return
        self.data = json.loads(path.read_text(encoding="utf-8"))
        wanted = {"format": FORMAT, **plan, "machine": machine}
        changed = sorted(key for key, value in wanted.items() if self.data.get(key) != value)
        if changed:
            raise SettingsError(
                f"{path} holds a run with another {' and '.join(changed)}: times of both do not compare; move it away."
            )

    def died_at(self) -> tuple[str, str] | None:
        """Case and series at which the last run ended without a word."""
        return None if self.data["attempt"] is None else tuple(self.data["attempt"])

    def attempt(self, case: str, series: str) -> None:
        """Notes what begins."""
        self.data["attempt"] = [case, series]
        self.save()

    def ended(self) -> None:
        """Notes that it ended, well or not."""
        self.data["attempt"] = None
        self.save()

    def save(self) -> None:
        """Writes the file in one go: never half of it."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(self.path.name + ".part")
        part.write_text(json.dumps(self.data, indent=1), encoding="utf-8")
        part.replace(self.path)
