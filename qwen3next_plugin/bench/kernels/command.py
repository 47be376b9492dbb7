"""``qwen3next bench kernels``, ``moe`` and ``merge``: this project's kernels beside the engines' own."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from qwen3next_plugin.errors import SettingsError

from .cases import Kind

if TYPE_CHECKING:  # --help must not wait for torch
    from .work import Engine

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


def _engine(peers: str) -> Engine:
    if peers == "vllm":
        return "vllm"
    if peers == "sglang":
        return "sglang"
    raise SettingsError(f"--peers: {peers!r} is not known: use vllm or sglang, whichever this Python has.")


def _run(kind: Kind, peers: str, rows: str, minutes: float | None, out: Path, commit: str | None) -> None:
    engine = _engine(peers)
    from .cases import parse_cases

    cases = parse_cases(kind, rows)
    import torch

    from qwen3next_plugin.config import parse_config
    from qwen3next_plugin.demo.shapes import config_of
    from qwen3next_plugin.kernels.gpus import gpu_slug
    from qwen3next_plugin.tune.cuda import this_machine

    from .gdn_work import gdn_work
    from .layer_work import layer_work
    from .measure import GpuLostError, Run
    from .moe_work import MoeBuilder
    from .state import PartState
    from .timing import graph_timer
    from .work import Work

    try:
        timer = graph_timer()
    except RuntimeError as error:
        raise SettingsError(str(error)) from None
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    device = torch.device("cuda", torch.cuda.current_device())
    spec = parse_config(config_of("80b", fp8=True))
    folder = out / gpu_slug(torch.cuda.get_device_name(device))
    result = folder / f"{kind}.json"
    state = PartState(folder / f"{kind}.{engine}.state.json", {"kind": kind, "engine": engine}, this_machine())
    state.data.setdefault("about", _about(commit))
    builder = MoeBuilder(spec, device)

    def build(case: Any, *rest: Any) -> Work:
        if case.op == "moe":
            return builder(case, *rest)
        return (gdn_work if case.op.startswith("gdn") else layer_work)(case, *rest)

    run = Run(state, spec, engine, device, timer, build)
    try:
        run.cases(cases, deadline, lambda: write_merged(result, kind))
    except GpuLostError as lost:
        print(f"qwen3next: {lost}", file=sys.stderr)
        raise typer.Exit(_AGAIN) from None
    print(result)


def write_merged(result: Path, kind: Kind) -> None:
    """Merges the state files beside ``result`` into it; those of another machine than the newest one's stay out."""
    from ..results import write_result
    from .result import merge, states_beside

    paths = sorted(states_beside(result, kind), key=lambda path: path.stat().st_mtime)
    states = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    mine = [state for state in states if all(state[key] == states[-1][key] for key in ("machine", "kind"))]
    mine = [state for state in mine if state["about"]["commit"] == states[-1]["about"]["commit"]]
    write_result(result, merge(sorted(mine, key=lambda state: str(state["engine"]), reverse=True)))


def _about(commit: str | None) -> dict[str, Any]:
    from qwen3next_plugin.activation import plugin_version

    from ..ceilings import measure_ceilings
    from ..command import git_commit

    found = {key: value for key, value in measure_ceilings().items() if key != "machine"}
    command = shlex.join(["qwen3next", *sys.argv[1:]])
    return {"command": command, "commit": commit or git_commit(), "plugin_version": plugin_version(), **found}
