"""``qwen3next doctor [CHECKPOINT] [--json]``."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..errors import SettingsError
from .checks import examine
from .finding import Finding, Level
from .kernels import print_kernels
from .surroundings import Surroundings

WITH_ERRORS = 1
_STYLES = {Level.OK: "green", Level.WARNING: "yellow", Level.ERROR: "bold red"}


def doctor(
    checkpoint: Annotated[
        Path | None,
        typer.Argument(metavar="[CHECKPOINT]", help="A checkpoint directory, to be looked at too.", show_default=False),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    kernels: Annotated[
        bool, typer.Option("--kernels", help="Print instead what runs for each operation, on the GPU here, and why.")
    ] = False,
    gpu: Annotated[
        str | None, typer.Option(metavar="NAME", help="With --kernels: on this GPU, such as h200 or rtx-4090.")
    ] = None,
) -> None:
    """Look at this environment: what is installed, what each engine would serve, and what to mend.

    Starts no engine. Prints a line a finding; exits with 1 if one of them is an error.
    """
    if gpu is not None and not kernels:
        raise SettingsError("--gpu is about kernels: give --kernels with it.")
    if kernels:
        print_kernels(gpu, as_json)
        return
    surroundings = Surroundings(checkpoint=checkpoint.absolute() if checkpoint else None)
    with Console(stderr=True).status("Looking, and asking the engines: this takes some seconds"):
        findings = list(examine(surroundings))
    if as_json:
        print(json.dumps(as_object(findings), indent=1))
    elif (console := Console()).is_terminal:
        console.print(as_table(findings))
        console.print(summary(findings))
    else:
        print("\n".join([*(as_line(finding) for finding in findings), summary(findings)]))
    if any(finding.level is Level.ERROR for finding in findings):
        raise typer.Exit(WITH_ERRORS)


def as_object(findings: list[Finding]) -> dict[str, object]:
    """For machines: the number of errors and warnings, and every finding with its four fields."""
    count = {level.value: sum(finding.level is level for finding in findings) for level in Level}
    return {
        "errors": count["error"],
        "warnings": count["warning"],
        "findings": [asdict(finding) for finding in findings],
    }


def as_line(finding: Finding) -> str:
    """One line, whatever is in it."""
    text = f"{finding.level.value:<7} {finding.check}: {finding.found}"
    return " ".join((text + (f" -> {finding.remedy}" if finding.remedy else "")).splitlines())


def as_table(findings: list[Finding]) -> Table:
    """For a terminal: one row a finding."""
    table = Table("", "check", header_style="bold")
    for title in ("found", "remedy"):
        table.add_column(title, overflow="fold")  # a path or a command is copied from here: never cut it
    for finding in findings:
        level = Text(finding.level.value, style=_STYLES[finding.level])
        table.add_row(level, Text(finding.check), Text(finding.found), Text(finding.remedy))
    return table


def summary(findings: list[Finding]) -> str:
    """The last line."""
    count = as_object(findings)
    return f"{count['errors']} error(s), {count['warnings']} warning(s)"
