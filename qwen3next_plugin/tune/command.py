"""``qwen3next tune``: measure tile sizes, compute them for other GPUs, hand them to the engines' own kernels."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3next_plugin.errors import SettingsError

if TYPE_CHECKING:  # --help must not wait for torch
    from qwen3next_plugin.spec import Qwen3NextSpec

    from .problem import Problem

INTERRUPTED = 130  # as shells report Ctrl-C

tune_app = typer.Typer(
    help="Tile sizes of the mixture of experts for the GPU at hand.",
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)

_MODEL = typer.Option(help="A folder with config.json; default: the published 80B shape.", show_default=False)
_TP = typer.Option(min=1, help="Tensor-parallel size: each GPU has a slice of every expert.")
_EP = typer.Option(min=1, help="Expert-parallel size: each GPU has a share of the experts.")
_DTYPE = typer.Option(help="bf16, or fp8 (128x128 blocks); default: as config.json says, fp8 without one.")


@tune_app.command()
def moe(
    model: Annotated[Path | None, _MODEL] = None,
    tp: Annotated[int, _TP] = 1,
    ep: Annotated[int, _EP] = 1,
    dtype: Annotated[str | None, _DTYPE] = None,
    effort: Annotated[str, typer.Option(help="quick, default or thorough.")] = "default",
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, e.g. 1,8,64; default: 1 to 8192.")] = None,
    out: Annotated[Path, typer.Option(help="Where <gpu>/E=….json goes, with its picture.")] = Path("moe-configs"),
    state: Annotated[
        Path | None, typer.Option(help="What was measured so far; default: beside the config. Taken up if it is there.")
    ] = None,
) -> None:
    """Measure the experts' tile sizes on this GPU and write the fastest whose output is right.

    Ctrl-C, or a machine that goes away, costs one measurement: run the same command again, there or on another machine
    with such a GPU and the state file. Afterwards serve with QWEN3NEXT_MOE_CONFIGS=<out>.
    """
    import torch
    from rich.console import Console

    from .cuda import CudaMachine, layers_that_fit, this_gpu, this_machine, versions
    from .problem import TOKENS
    from .run import About, Place, parse_tokens, tune
    from .space import EFFORTS

    if effort not in EFFORTS:
        raise SettingsError(f"--effort: {effort!r} is not known: use {', '.join(EFFORTS)}.")
    counts = TOKENS if tokens is None else parse_tokens(tokens)
    problem = _problem(_spec(model), tp, ep, dtype)
    gpu = this_gpu()
    place = Place(out, state)
    about = About(versions(), this_machine())

    def machine() -> CudaMachine:
        return CudaMachine(problem, gpu, layers_that_fit(problem), torch.device("cuda", torch.cuda.current_device()))

    try:
        path, _ = tune(gpu, problem, effort, counts, place, about, machine, Console(stderr=True))
    except KeyboardInterrupt:
        file = place.state_path(gpu, problem)
        print(f"qwen3next: stopped; {file} keeps what was measured: run the same command again.", file=sys.stderr)
        raise typer.Exit(INTERRUPTED) from None
    print(path)
    print(f"Serve with it: QWEN3NEXT_MOE_CONFIGS={out.absolute()}")


@tune_app.command()
def export(
    engine: Annotated[str, typer.Argument(metavar="ENGINE", help="vllm or sglang.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    model: Annotated[Path | None, _MODEL] = None,
    tp: Annotated[int, _TP] = 1,
    ep: Annotated[int, _EP] = 1,
    dtype: Annotated[str | None, _DTYPE] = None,
    gpu: Annotated[str | None, typer.Option(help='As the driver names it, "NVIDIA H200"; default: this one.')] = None,
    configs: Annotated[
        Path | None, typer.Option(help="The folder that `tune moe` wrote to, before the shipped.")
    ] = None,
) -> None:
    """Write the engine's own kernel a config file for where it ships none. To be run where the engine is installed."""
    from qwen3next_plugin.kernels.moe.config import CONFIGS

    from .cuda import this_gpu
    from .export import export as write

    problem = _problem(_spec(model), tp, ep, dtype)
    folders = (CONFIGS,) if configs is None else (configs, CONFIGS)
    try:
        done = write(engine, directory, problem, gpu or this_gpu().name, folders)
    except ValueError as broken:  # a config file that is none
        raise SettingsError(f"--configs: {broken}.") from None
    for path in done.written:
        print(path)
    for name in done.shipped:
        print(f"{engine} ships {name}: left as it is.", file=sys.stderr)
    if done.written:
        print(f"Serve with them: {done.variable}")


@tune_app.command("defaults")
def write_defaults(
    out: Annotated[Path, typer.Option(help="Where <gpu>/E=….json go.")],
    model: Annotated[Path | None, _MODEL] = None,
) -> None:
    """Compute config files from the known GPUs' properties; measured ones are left as they are."""
    from .defaults import compute_files

    written = compute_files(out, _spec(model))
    print(f"{len(written)} files computed in {out}.")


def _spec(model: Path | None) -> Qwen3NextSpec:
    from qwen3next_plugin.config import load_spec, parse_config
    from qwen3next_plugin.demo.shapes import config_of

    return parse_config(config_of("80b", fp8=True)) if model is None else load_spec(model)


def _problem(spec: Qwen3NextSpec, tp: int, ep: int, dtype: str | None) -> Problem:
    from .problem import problem_of

    if dtype is None and spec.quant is not None and spec.quant.rules:
        raise SettingsError(
            f"--model is {spec.quant.method}, and tiles are searched for bf16 and fp8 experts only: give one of "
            "the two as --dtype, or leave packed integers to their default tiles."
        )
    return problem_of(spec, tp, ep, dtype or ("bf16" if spec.quant is None else "fp8"))
