"""``qwen3next doctor --kernels``: what runs for each operation, as `kernels.dispatch` has it."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import SettingsError
from ..settings import read_settings

if TYPE_CHECKING:  # the rest of the doctor does without torch
    from ..kernels.dispatch import Row

_TITLES = ("operation", "for", "runs", "why", "tiles")


def print_kernels(gpu: str | None, as_json: bool) -> None:
    """Print the table for the GPU of that name, None: the one here, and for a CPU where there is none.

    With the environment's settings, as a server started from here would have them. Raises SettingsError for a name that
    is not known.
    """
    from ..kernels import dispatch
    from ..kernels.gpus import target_named

    settings = read_settings()
    settings.tell_kernels()
    try:
        target = dispatch.present() if gpu is None else target_named(gpu)
    except ValueError as error:
        raise SettingsError(f"--gpu: {error}.") from None
    if not settings.enabled:
        raise SettingsError(
            "QWEN3NEXT_PLUGIN is 0: the stock engine runs its own kernels; unset it to see this plugin's."
        )
    rows = dispatch.table(target)
    device = "a CPU (no GPU is here; --gpu NAME shows another)" if target is None else target.name
    if as_json:
        listed = [{"operation": row.operation, **asdict(row.choice)} for row in rows]
        print(json.dumps({"device": target.name if target else "cpu", "operations": listed}, indent=1))
    elif (console := Console()).is_terminal:
        console.print(f"What runs on {device}:")
        console.print(_as_table(rows))
    else:
        print("\n".join([f"What runs on {device}:", *map(_as_lines, rows)]))


def _cells(row: Row) -> tuple[str, ...]:
    choice = row.choice
    return row.operation, choice.shapes, choice.runs, choice.why, choice.tiles


def _as_lines(row: Row) -> str:
    operation, shapes, runs, why, tiles = _cells(row)
    rest = "; ".join(part for part in (why, f"tiles: {tiles}" if tiles else "") if part)
    line = f"{operation}: {shapes} -> {runs}{f' ({rest})' if rest else ''}"
    return "\n".join([line, *(f"  {detail}" for detail in row.choice.details)])


def _as_table(rows: list[Row]) -> Table:
    table = Table(header_style="bold")
    for title in _TITLES:
        table.add_column(title, overflow="fold")
    before = ""
    for row in rows:
        operation, *cells = _cells(row)
        table.add_row(*map(Text, ("" if operation == before else operation, *cells)))
        for detail in row.choice.details:
            table.add_row("", "", "", Text(detail), "")
        before = operation
    return table
