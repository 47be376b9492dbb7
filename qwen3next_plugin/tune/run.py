"""One tuning from its problem to its files, on whatever machine it is given."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.gpus import Gpu, gpu_slug
from qwen3next_plugin.kernels.moe.config import CONFIGS, MoeConfig, default_config, nearest, read_file

from .files import as_text, check_writable, write_atomically
from .plot import plot_winners
from .problem import Problem
from .result import as_line, as_table, measured_file
from .search import Machine, Search, Winner
from .space import EFFORTS
from .state import State

ALLOWED_ERROR = {2: 2e-2, 1: 6e-2}  # by bytes of an activation: three roundings to bf16, or to FP8 on both sides


@dataclass(frozen=True)
class Place:
    """Where a tuning's files go: ``out``/<gpu>/<the problem's file>, and the state beside it or where it was asked."""

    out: Path
    state: Path | None

    def config_path(self, gpu: Gpu, problem: Problem) -> Path:
        """Of the config file."""
        return self.out / gpu_slug(gpu.name) / problem.file_name

    def state_path(self, gpu: Gpu, problem: Problem) -> Path:
        """Of the measurements."""
        return self.state or self.config_path(gpu, problem).with_suffix(".state.jsonl")


@dataclass(frozen=True)
class About:
    """What measurements are made with."""

    versions: dict[str, str]
    machine: str


class Progressing:
    """A bar with the time left, on a terminal; elsewhere one line a number of tokens, on standard error."""

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


def runs_now(gpu: Gpu, problem: Problem) -> Callable[[int], MoeConfig]:
    """What the kernels take without a file of the user's: the shipped file's config, or the table's."""
    path = CONFIGS / gpu_slug(gpu.name) / problem.file_name

    def config(tokens: int) -> MoeConfig:
        activation_bytes = problem.activation_bytes(tokens, gpu)
        found = nearest(read_file(path).entries, tokens, activation_bytes) if path.is_file() else None
        return found or default_config(tokens * problem.top_k, problem.experts, activation_bytes)

    return config


def parse_tokens(text: str) -> tuple[int, ...]:
    """Numbers with commas between, in order, each once. Raises SettingsError for anything else."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = ()
    if not found or found[0] < 1:
        raise SettingsError(f"--tokens: {text!r} is not a list of numbers of tokens: give some, as in 1,8,64,512.")
    return found


def tune(
    gpu: Gpu,
    problem: Problem,
    effort: str,
    tokens: Sequence[int],
    place: Place,
    about: About,
    machine: Callable[[], Machine],
    console: Console,
) -> tuple[Path, list[Winner]]:
    """Measures, writes the config file, prints the table and draws the picture; returns the file and what won.

    ``machine`` is only made once the state file has been accepted, since filling a GPU's memory takes a while. Raises
    PluginError, one sentence; what was measured until then is in the state file.
    """
    path, state_path = place.config_path(gpu, problem), place.state_path(gpu, problem)
    check_writable(path.parent)
    identity = {"gpu": gpu.name, "sms": gpu.sms, "problem": asdict(problem), **about.versions}
    state = State(state_path, identity, about.machine)
    before = runs_now(gpu, problem)
    search = Search(gpu, problem, EFFORTS[effort], before, machine(), state)
    progress = Progressing(console, sum(search.planned(count) for count in tokens))
    winners: list[Winner] = []
    with progress.bar:
        for count in tokens:
            progress.bar.update(progress.task, description=f"{count} tokens")
            allowed = ALLOWED_ERROR[problem.activation_bytes(count, gpu)]
            ended = progress.done + search.planned(count)
            winners.append(search.run(count, allowed, progress.tick))
            progress.done = ended  # a config met twice is measured once
            progress.say(as_line(winners[-1]))
    content = measured_file(gpu, problem, about.versions, effort, winners)
    write_atomically(path, as_text(content))
    if console.is_terminal:
        console.print(as_table(winners))
    try:
        plot_winners(winners, f"{gpu.name}: {path.stem}", path.with_suffix(".png"))
    except SettingsError as missing:
        console.print(f"No picture: {missing}", highlight=False, markup=False, soft_wrap=True)
    return path, winners
