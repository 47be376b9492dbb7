"""A run from its request to its files: needs a GPU and one engine, and no command line."""

import json
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from qwen3next_plugin.activation import plugin_version
from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.gdn_peers import try_prefills
from qwen3next_plugin.kernels.gdn.peers import OFFERS
from qwen3next_plugin.kernels.gpus import gpu_slug
from qwen3next_plugin.tune.cuda import this_machine
from qwen3next_plugin.tune.gdn.engines import offer

from ..ceilings import measure_ceilings
from ..results import told_command, write_result
from .cases import Case, Kind, parse_cases, profiled_among
from .gdn_work import gdn_work
from .launches import profile_cases, profiled_launches
from .layer_work import layer_work
from .measure import Build, Run
from .moe_work import MoeBuilder
from .peers.sglang_context import compile_no_more_than_asked
from .result import merge, states_beside
from .state import PartState
from .timing import GraphTimer, OnceTimer, graph_timer
from .work import Engine, Work, rehearsing


def engine_named(peers: str) -> Engine:
    """ "vllm" or "sglang", to be imported in this process. Raises SettingsError for another name."""
    if peers == "vllm":
        return "vllm"
    if peers == "sglang":
        compile_no_more_than_asked()
        return "sglang"
    raise SettingsError(f"--peers: {peers!r} is not known: use vllm or sglang, whichever this Python has.")


def run_parts(
    kind: Kind, peers: str, rows: str, minutes: float | None, out: Path, commit: str | None, profile: str = ""
) -> Path:
    """Measures and writes ``<out>/<gpu>/<kind>.<peers>.state.json`` after every implementation, and what lies beside
    it merged into ``<kind>.json`` after every row, whose path comes back. Rows that the state has are not done again.
    Those of ``profile`` are profiled when all are timed.

    Raises SettingsError for a bad request, a state of another machine or no GPU, and GpuLostError.
    """
    engine, cases = engine_named(peers), parse_cases(kind, rows)
    profiled = profiled_among([case.name for case in cases], profile)
    timer, device, spec = _timer(GraphTimer), _device(), _spec()
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    folder = out / gpu_slug(torch.cuda.get_device_name(device))
    result = folder / f"{kind}.json"
    state = PartState(folder / f"{kind}.{engine}.state.json", {"kind": kind, "engine": engine}, this_machine())
    if "about" not in state.data:
        state.data["about"] = _about(commit)
    run = Run(state, spec, engine, device, timer, builder(MoeBuilder(spec, device)))
    run.cases(cases, deadline, lambda: write_merged(result, kind))
    # Last in the process: launches are slower from the first profile on.
    chosen = [case for case in cases if case.name in profiled]
    profile_cases(run, chosen, profiled_launches, deadline, lambda: write_merged(result, kind))
    return result


def rehearse_parts(kind: Kind, peers: str, rows: str) -> None:
    """Runs each row once, with little memory, and keeps nothing of it but what compilers put into their caches.

    Several may run side by side. Raises as `run_parts`.
    """
    engine, cases = engine_named(peers), parse_cases(kind, rows)
    timer, device, spec = _timer(OnceTimer), _device(), _spec()
    with TemporaryDirectory() as folder, rehearsing():
        state = PartState(Path(folder) / "state.json", {"kind": kind, "engine": engine}, this_machine())
        run = Run(state, spec, engine, device, timer, builder(MoeBuilder(spec, device)))
        run.cases(cases, None, lambda: None)


def _timer(kind: type[GraphTimer]) -> GraphTimer:
    try:
        return graph_timer(kind)
    except RuntimeError as error:
        raise SettingsError(str(error)) from None


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def _spec() -> Qwen3NextSpec:
    return parse_config(config_of("80b", fp8=True))


def builder(moe: MoeBuilder) -> Build:
    """What makes the work of any case."""

    def build(case: Case, *rest: Any) -> Work:
        if case.op == "moe":
            return moe(case, *rest)
        if case.op == "gdn-prefill":
            _offer_prefills(*rest)
        return (gdn_work if case.op.startswith("gdn") else layer_work)(case, *rest)

    return build


def _offer_prefills(spec: Qwen3NextSpec, engine: Engine, device: torch.device) -> None:
    """Has the engine's prefill functions tried, as at its start: what the model runs may be one of them."""
    if device.type != "cuda" or OFFERS.found or OFFERS.missing:
        return
    offer(engine)
    try_prefills(spec.gdn, 1, torch.bfloat16)


def write_merged(result: Path, kind: Kind) -> None:
    """Merges the state files beside ``result`` into it; what does not compare with the newest one stays out."""
    paths = sorted(states_beside(result, kind), key=lambda path: path.stat().st_mtime)
    states = [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    alike = ("machine", "commit", "plugin_version", "gpu")
    newest = [states[-1].get(key, states[-1]["about"].get(key)) for key in alike]
    mine = [state for state in states if [state.get(key, state["about"].get(key)) for key in alike] == newest]
    write_result(result, merge(sorted(mine, key=lambda state: str(state["engine"]), reverse=True)))


def _about(commit: str | None) -> dict[str, Any]:
    if commit is None:
        from ..command import git_commit  # needs typer, which a machine with a GPU may not have

        commit = git_commit()
    found = {key: value for key, value in measure_ceilings().items() if key != "machine"}
    return {"command": told_command(sys.argv[1:]), "commit": commit, "plugin_version": plugin_version(), **found}
