"""What the user sees while something runs: a spinner on a terminal, plain lines elsewhere. Standard library only."""

import sys
import time
from types import TracebackType
from typing import TextIO

FRAMES = "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
SECONDS_BETWEEN_PLAIN_LINES = 15.0


class Progress:
    """One running step: `with Progress("Loading") as step: step.update("12 of 40")`.

    On a terminal one line is redrawn with every `update`; elsewhere a line is printed when the detail changes (at most
    every 15 s for one that `counts`) and once at the end. `update` is called often, a few times a second.
    """

    def __init__(self, title: str, stream: TextIO | None = None) -> None:
        self.title = title
        self.stream = stream or sys.stdout
        self.live = self.stream.isatty()
        self.began = time.monotonic()
        self._detail = ""
        self._frame = 0
        self._printed_at = self.began

    @property
    def seconds(self) -> float:
        """Seconds since the step began."""
        return time.monotonic() - self.began

    def update(self, detail: str, *, counts: bool = False) -> None:
        """Show `detail` beside the title. `counts`: it changes all the time, and need not be printed each time."""
        line = " · ".join(part for part in (self.title, f"{self.seconds:.0f} s", detail) if part)
        if self.live:
            self._frame += 1
            self._write(f"\r\x1b[2K{FRAMES[self._frame % len(FRAMES)]} {line[:110]}")
            return
        waited = time.monotonic() - self._printed_at
        if waited > SECONDS_BETWEEN_PLAIN_LINES or (detail != self._detail and not counts):
            self._printed_at = time.monotonic()
            self._write(f"  {line}\n")
        self._detail = detail

    def _write(self, text: str) -> None:
        self.stream.write(text)
        self.stream.flush()

    def __enter__(self) -> "Progress":
        if self.live:
            self.update("")
        else:
            self._write(f"  {self.title} …\n")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        mark = "✓" if kind is None else "✗"
        clear = "\r\x1b[2K" if self.live else ""
        self._write(f"{clear}{mark} {self.title} ({self.seconds:.0f} s)\n")
