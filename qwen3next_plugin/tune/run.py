"""One tuning from its problem to its files, on whatever machine it is given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from rich.console import Console

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.gpus import Gpu, gpu_slug
from qwen3next_plugin.kernels.moe.config import CONFIGS, MoeConfig, default_config, nearest, read_file

from .ahead import compile_ahead
from .files import as_text, check_writable, write_atomically
from .measuring import Machine
from .plot import plot_winners
from .problem import Problem
from .result import as_line, as_table, measured_file
from .search import FORM, Search, Winner
from .session import About, Place, Progressing
from .space import EFFORTS
from .state import State

ALLOWED_ERROR = {2: 2e-2, 1: 6e-2}  # by bytes of an activation: three roundings to bf16, or to FP8 on both sides


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
    machine: Callable[[], Machine[int, MoeConfig]],
    console: Console,
) -> tuple[Path, list[Winner]]:
    """Measures, writes the config file, prints the table and draws the picture; returns the file and what won.

    ``machine`` is only made once the state file has been accepted, since filling a GPU's memory takes a while. Raises
    PluginError, one sentence; what was measured until then is in the state file.
    """
    path, state_path = place.config_path(gpu, problem.file_name), place.state_path(gpu, problem.file_name)
    check_writable(path.parent)
    identity = {"gpu": gpu.name, "sms": gpu.sms, "problem": asdict(problem), **about.versions}
    state = State(state_path, identity, about.machine, FORM)
    before = runs_now(gpu, problem)
    search = Search(gpu, problem, EFFORTS[effort], before, machine(), state)
    ahead = [(count, config) for count in tokens for config in search.unmeasured(count)]
    compile_ahead(search.machine.once, ahead, console)
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
