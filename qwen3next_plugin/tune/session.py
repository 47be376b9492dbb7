"""What a tuning needs besides its search: places for files, what it is made with, a bar with the time left."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qwen3next_plugin.kernels.gpus import Gpu, gpu_slug


@dataclass(frozen=True)
class Place:
    """Where a tuning's files go: ``out``/<gpu>/<a file of that name>, the state beside it or where it was asked."""

    out: Path
    state: Path | None

    def config_path(self, gpu: Gpu, file_name: str) -> Path:
        """Of the config file."""
        return self.out / gpu_slug(gpu.name) / file_name

    def state_path(self, gpu: Gpu, file_name: str) -> Path:
        """Of the measurements."""
        return self.state or self.config_path(gpu, file_name).with_suffix(".state.jsonl")


@dataclass(frozen=True)
class About:
    """What measurements are made with, and the day."""

    versions: dict[str, str]
    machine: str
    date: str = ""


class Progressing:
    """A bar with the time left, on a terminal; elsewhere what `say` is given, on standard error."""

    def __init__(self, console: Console, total: int, clock: Callable[[], float] = time.monotonic) -> None:
        self.console = console
        self.clock = clock
        self.total, self.done, self.measured = total, 0, 0
        self.begin = clock()
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[left]}"),
        )
        self.bar = Progress(*columns, console=console, disable=not console.is_terminal, transient=True)
        self.task = self.bar.add_task("", total=total, left="")

    def expect(self, description: str, total: int) -> None:
        """What is being done, and how much of it there is as far as is known by now."""
        self.total = total
        self.bar.update(self.task, description=description, total=total)

    def tick(self, seconds: float) -> None:
        """One measurement less to make; 0 seconds for one that was known."""
        self.done += 1
        self.measured += seconds > 0
        self.bar.update(self.task, completed=self.done, left=self.left())

    def left(self) -> str:
        """The time left by what a measurement took on average, compiling included; known ones count for nothing."""
        if not self.measured:
            return ""
        seconds = (self.clock() - self.begin) / self.measured * (self.total - self.done)
        return f"{seconds / 60:.0f} min left" if seconds >= 90 else f"{max(seconds, 0):.0f} s left"

    def say(self, text: str) -> None:
        """A line above the bar."""
        self.console.print(f"{text} {self.left()}".rstrip(), highlight=False, markup=False, soft_wrap=True)
