"""One tuning from its heads to its file, on whatever machine it is given."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Protocol

from rich.console import Console

from qwen3next_plugin.kernels.gdn.config import FILE, shipped
from qwen3next_plugin.kernels.gpus import Gpu, Target

from ..ahead import compile_ahead
from ..files import as_text, check_writable, write_atomically
from ..measuring import Machine, Measuring
from ..session import About, Place, Progressing
from ..state import State
from .engines import NONE
from .result import Where, as_line, as_table, measured_file, table_from
from .search import Part, Search
from .space import FORM, Candidate, Heads, Shape, effort_for


class GdnMachine(Machine[Shape, Candidate], Protocol):
    """A GPU with these heads' functions at hand: ``peers`` ran and agreed, ``missing`` says why others did not."""

    peers: tuple[str, ...]
    missing: dict[str, str]


def tune_gdn(
    gpu: Gpu,
    heads: Heads,
    engine: str,
    effort: str,
    place: Place,
    about: About,
    machine: Callable[[], GdnMachine],
    console: Console,
) -> tuple[Path, list[Part]]:
    """Measures, writes the table, prints what was before and after; returns the file and what it rests on.

    ``machine`` is only made once the state file has been accepted: an engine's functions may have to be built for it.
    Raises PluginError, one sentence; what was measured until then is in the state file.
    """
    say = partial(console.print, highlight=False, markup=False, soft_wrap=True)
    path, state_path = place.config_path(gpu, FILE), place.state_path(gpu, FILE)
    check_writable(path.parent)
    identity = {"gpu": gpu.name, "sms": gpu.sms, "heads": asdict(heads), "engine": engine, **about.versions}
    state = State(state_path, identity, about.machine, FORM)
    if engine != NONE:
        say(f"Trying the prefill functions of {engine}, which may compile for some minutes the first time.")
    at_hand = machine()
    for name, why in at_hand.missing.items():
        say(f"{name} is left out: {why}.")
    table = shipped(Target(gpu.name, gpu.capability))
    measuring = Measuring(at_hand, state)
    search = Search(heads, effort_for(effort, gpu.capability), table, at_hand.peers, measuring)
    compile_ahead(at_hand.once, search.unmeasured(), console)
    planned = list(search.parts())
    progress = Progressing(console, sum(one.count for one in planned))
    measuring.tick = progress.tick
    parts: list[Part] = []
    with progress.bar:
        for one in planned:
            progress.bar.update(progress.task, description=one.group.shapes[0].op)
            ended = progress.done + one.count
            parts.append(one.find())
            progress.done = ended  # what was left out after the scouts is not measured
            for result in parts[-1].results:
                progress.say(as_line(result))
    where = Where(gpu, heads, about)
    measured = table_from(parts, table, at_hand.peers, where)
    write_atomically(path, as_text(measured_file(measured, parts, effort, at_hand.missing, where)))
    if console.is_terminal:
        console.print(as_table(parts))
    return path, parts
