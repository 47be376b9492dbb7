"""How a tuner says what it measured: before, after, and how much faster."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from rich.table import Table


class Measured(Protocol):
    """What was chosen somewhere: seconds a call, what ran before took, and on how many machines that was measured."""

    @property
    def seconds(self) -> float: ...

    @property
    def before_seconds(self) -> float: ...

    @property
    def machines(self) -> int: ...


def speed_text(one: Measured) -> str:
    """How many times as fast as before; empty where nothing ran before."""
    faster = one.before_seconds / one.seconds
    return f"{faster:.2f}x" if faster < float("inf") else ""


def line_of(place: str, one: Measured, choice: str) -> str:
    """One line for a log."""
    several = f", on {one.machines} machines" if one.machines > 1 else ""
    times = f"{1e6 * one.before_seconds:.1f} -> {1e6 * one.seconds:.1f} us ({speed_text(one)})"
    return f"{place}: {times} with {choice}{several}"


def cells_of(one: Measured) -> tuple[str, str, str]:
    """Before and after in us, and how much faster, for a row of :func:`table_for`."""
    after = f"{1e6 * one.seconds:.1f}" + (" *" if one.machines > 1 else "")
    return f"{1e6 * one.before_seconds:.1f}", after, speed_text(one)


def table_for(place: str, choices: Iterable[str], measured: Iterable[Measured]) -> Table:
    """For a terminal, without rows yet: columns for the place, the times and what was chosen there."""
    table = Table(place, header_style="bold")
    for title in ("before, us", "after, us", "faster"):
        table.add_column(title, justify="right")
    for title in choices:
        table.add_column(title)
    if any(one.machines > 1 for one in measured):
        table.caption = "* measured on more than one machine, which differ by some percent"
    return table
