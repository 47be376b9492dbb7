"""A run as the command line sees it: progress on the terminal, result files that grow row by row."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from qwen3next_plugin.activation import plugin_version
from qwen3next_plugin.kernels.gpus import gpu_slug
from qwen3next_plugin.serve.processes import stop_on_termination

from .engines import EngineSetup
from .profile import profile_table
from .results import assemble, told_command, write_result
from .rows import Visit
from .run import Bench
from .state import State, left_to_do


@dataclass(frozen=True)
class RunFiles:
    """Where a run's files go: results below ``out``, engines' logs, records and caches below ``work``."""

    name: str
    out: Path
    state: Path
    work: Path
    commit: str | None
    evidence: bool = True


def measure_and_write(
    model: Path,
    visits: list[Visit],
    setups: Mapping[Any, EngineSetup],
    plan: dict[str, Any],
    run: RunFiles,
    deadline: float | None,
) -> list[Path]:
    """Measures what is left and writes a result file an engine, after every repeat. Returns the files."""
    state = State(run.state, plan)
    engines = list(dict.fromkeys(visit.side.engine for visit in visits))
    command = told_command(sys.argv[1:])
    about = {"command": command, "commit": run.commit, "plugin_version": plugin_version(), "model": _model(model)}
    files: dict[str, Path] = {}

    def saved() -> None:
        for engine in engines:
            result = assemble(state.data, model, visits, engine, about)
            if result["sessions"]:
                file = f"{run.name}-{engine}.json" if len(engines) > 1 else f"{run.name}.json"
                files[engine] = run.out / gpu_slug(result["sessions"][0]["gpu"]) / file
                write_result(files[engine], result)

    console = Console(stderr=True)
    if not console.is_terminal:
        console = Console(stderr=True, width=120)
    total = sum(len(visit.rows) for visit in visits)
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(24), TextColumn("{task.fields[left]}"))
    with Progress(*columns, TimeElapsedColumn(), console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("starting", total=total, left="")
        shown = ""

        def tick(text: str, seconds_left: float | None) -> None:
            nonlocal shown
            session = state.data["sessions"][-1] if state.data["sessions"] else {"visits": {}}
            todo = sum(len(rows) for _, rows in left_to_do(session, visits, plan["repeats"]))
            left = "" if seconds_left is None else f"about {seconds_left / 60:.1f} min left"
            progress.update(task, completed=total - todo, description=text, left=left)
            line = text.split(", ")[0]
            if not console.is_terminal and line != shown:
                shown = line
                print(f"{line}{'; ' if left else ''}{left}", file=sys.stderr, flush=True)

        bench = Bench(model, visits, setups, state, run.work, plan["repeats"], plan["steps"], deadline=deadline)
        bench.tick, bench.saved, bench.evidence = tick, saved, run.evidence
        stop_on_termination()
        try:
            done = bench.run()
        except KeyboardInterrupt:
            done = False
    if not done:
        print("Stopped before the end: the same command again measures what is left.", file=sys.stderr)
    for file in files.values():
        show(file, console)
    return list(files.values())


def show(file: Path, console: Console) -> None:
    """Prints a result file's table."""
    import json

    from rich.table import Table

    result = json.loads(file.read_text(encoding="utf-8"))
    table = Table(title=str(file))
    for heading in ("case", "unit", "stock vLLM", "stock SGLang", "plugin", "plugin / stock", "of floor", "spread"):
        table.add_column(heading, justify="left" if heading in ("case", "unit") else "right")
    for row in result["rows"]:
        ratio = f"{row['plugin'] / row['stock']:.2f}" if row["plugin"] and row["stock"] else ""
        share = f"{row['share_of_floor']:.0%}" if row["share_of_floor"] else ""
        spread = max(row["spread"].values(), default=None)
        cells = [_cell(row[key]) for key in ("stock_vllm", "stock_sglang", "plugin")]
        table.add_row(row["case"], row["unit"], *cells, ratio, share, "" if spread is None else f"{spread:.1%}")
    console.print(table)
    for name, profiles in result["profiles"].items():
        console.print(f"\n{name}, GPU time a step:\n{profile_table(profiles)}", markup=False)


def _cell(value: float | None) -> str:
    return "" if value is None else f"{value:.4g}"


def _model(model: Path) -> dict[str, Any]:
    import json

    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    keys = ("num_hidden_layers", "hidden_size", "num_experts", "num_experts_per_tok", "vocab_size")
    quantization = config.get("quantization_config", {})
    return {key: config[key] for key in keys} | {
        "dtype": config["torch_dtype"],
        "quantization": quantization.get("quant_method"),
        "weight_block_size": quantization.get("weight_block_size"),
        "weights": "synthetic",
    }
