"""``qwen3next bench kernels``, ``moe`` and ``merge``: this project's kernels beside the engines' own."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from .cases import Kind

_PEERS = typer.Option(help="vllm or sglang: the engine that this Python has.")
_ROWS = typer.Option(help="Names or patterns with commas between, or all.")
_MINUTES = typer.Option(help="Begin no row later than this.")
_OUT = typer.Option(help="Where <gpu>/<kind>.json and its state files go.")
_COMMIT = typer.Option(help="Git commit, where there is no repository to ask.")
_AGAIN = 3  # exit code: the GPU was lost, run the same command again


def kernels(
    peers: Annotated[str, _PEERS],
    rows: Annotated[str, _ROWS] = "all",
    minutes: Annotated[float | None, _MINUTES] = None,
    out: Annotated[Path, _OUT] = Path("benchmarks/results"),
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Measure the layers' operations beside one engine's own; run it once an engine, on one machine."""
    _run("kernels", peers, rows, minutes, out, commit)


def moe(
    peers: Annotated[str, _PEERS],
    rows: Annotated[str, _ROWS] = "all",
    minutes: Annotated[float | None, _MINUTES] = None,
    out: Annotated[Path, _OUT] = Path("benchmarks/results"),
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Measure the mixture of experts beside one engine's own; run it once an engine, on one machine."""
    _run("moe", peers, rows, minutes, out, commit)


def merge_states(
    states: Annotated[list[Path], typer.Argument(metavar="STATES", help="State files of one kind and one machine.")],
    out: Annotated[Path, typer.Option(help="The result file.")],
) -> None:
    """Put the runs of several engines into one result file. `kernels` and `moe` do it with what lies side by side."""
    from ..results import write_result
    from .result import merge

    write_result(out, merge([json.loads(path.read_text(encoding="utf-8")) for path in states]))
    print(out)


def _run(kind: Kind, peers: str, rows: str, minutes: float | None, out: Path, commit: str | None) -> None:
    from .measure import GpuLostError
    from .session import run_parts

    try:
        print(run_parts(kind, peers, rows, minutes, out, commit))
    except GpuLostError as lost:
        print(f"qwen3next: {lost}", file=sys.stderr)
        raise typer.Exit(_AGAIN) from None
