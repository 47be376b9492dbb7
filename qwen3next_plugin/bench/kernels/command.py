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
_PROFILE = typer.Option(
    help="Names or patterns of rows that are run, or all of them: adds GPU time by kernel, once all rows are timed."
)
_MINUTES = typer.Option(help="Begin no row later than this.")
_OUT = typer.Option(help="Where <gpu>/<kind>.json and its state files go.")
VLLM_PYTHON = typer.Option(help="The Python that has vLLM.")
SGLANG_PYTHON = typer.Option(help="The Python that has SGLang.")
ENVIRONMENT = typer.Option(help="A shell file to source before this engine, e.g. one that sets PYTHONPATH.")
_COMMIT = typer.Option(help="Git commit, where there is no repository to ask.")
_REHEARSE = typer.Option(
    "--rehearse", help="Run every row once and keep nothing: fills compilers' caches, beside other such runs."
)
GPU_LOST = 3  # exit code: run the same command again


def kernels(
    peers: Annotated[str, _PEERS],
    rows: Annotated[str, _ROWS] = "all",
    profile: Annotated[str, _PROFILE] = "",
    minutes: Annotated[float | None, _MINUTES] = None,
    out: Annotated[Path, _OUT] = Path("benchmarks/results"),
    commit: Annotated[str | None, _COMMIT] = None,
    rehearse: Annotated[bool, _REHEARSE] = False,
) -> None:
    """Measure the layers' operations beside one engine's own; run it once an engine, on one machine."""
    _run("kernels", peers, rows, minutes, out, commit, profile, rehearse)


def moe(
    peers: Annotated[str, _PEERS],
    rows: Annotated[str, _ROWS] = "all",
    profile: Annotated[str, _PROFILE] = "",
    minutes: Annotated[float | None, _MINUTES] = None,
    out: Annotated[Path, _OUT] = Path("benchmarks/results"),
    commit: Annotated[str | None, _COMMIT] = None,
    rehearse: Annotated[bool, _REHEARSE] = False,
) -> None:
    """Measure the mixture of experts beside one engine's own; run it once an engine, on one machine."""
    _run("moe", peers, rows, minutes, out, commit, profile, rehearse)


def both(
    rows: Annotated[
        str, typer.Option(help="Names or patterns of kernels and moe with commas between, or all.")
    ] = "all",
    profile: Annotated[str, _PROFILE] = "",
    minutes: Annotated[float | None, _MINUTES] = None,
    out: Annotated[Path, _OUT] = Path("benchmarks/results"),
    jobs: Annotated[
        int | None, typer.Option(min=0, help="Rehearsals side by side; default: one a core, 16 at most.")
    ] = None,
    work: Annotated[Path, typer.Option(help="Logs.")] = Path("build/bench"),
    vllm_python: Annotated[str, VLLM_PYTHON] = sys.executable,
    vllm_env: Annotated[Path | None, ENVIRONMENT] = None,
    sglang_python: Annotated[str, SGLANG_PYTHON] = sys.executable,
    sglang_env: Annotated[Path | None, ENVIRONMENT] = None,
    commit: Annotated[str | None, _COMMIT] = None,
) -> None:
    """Measure single operations beside both engines: all rows rehearsed side by side, then each engine's run alone."""
    from ..engines import EngineSetup
    from .both import Request, run_both

    setups = {"vllm": EngineSetup(vllm_python, vllm_env), "sglang": EngineSetup(sglang_python, sglang_env)}
    run_both(Request(rows, setups, out, work, minutes, jobs, commit, profile))


def merge_states(
    states: Annotated[list[Path], typer.Argument(metavar="STATES", help="State files of one kind and one machine.")],
    out: Annotated[Path, typer.Option(help="The result file.")],
) -> None:
    """Put the runs of several engines into one result file. `kernels` and `moe` do it with what lies side by side."""
    from ..results import write_result
    from .result import merge

    write_result(out, merge([json.loads(path.read_text(encoding="utf-8")) for path in states]))
    print(out)


def _run(
    kind: Kind,
    peers: str,
    rows: str,
    minutes: float | None,
    out: Path,
    commit: str | None,
    profile: str,
    rehearse: bool,
) -> None:
    from .measure import GpuLostError
    from .session import rehearse_parts, run_parts

    try:
        if rehearse:
            rehearse_parts(kind, peers, rows)
        else:
            print(run_parts(kind, peers, rows, minutes, out, commit, profile))
    except GpuLostError as lost:
        print(f"qwen3next: {lost}", file=sys.stderr)
        raise typer.Exit(GPU_LOST) from None
