"""``qwen3next tune``: measure tile sizes and who runs what, compute tiles for other GPUs, hand them to the engines."""

from __future__ import annotations

import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from qwen3next_plugin.errors import SettingsError

if TYPE_CHECKING:  # --help must not wait for torch
    from qwen3next_plugin.spec import Qwen3NextSpec

    from .problem import Problem

INTERRUPTED = 130  # as shells report Ctrl-C

tune_app = typer.Typer(
    help="Which kernels run in which tiles on the GPU at hand, by measuring it.",
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
    tokens: Annotated[str | None, typer.Option(help="Numbers of tokens, e.g. 24,64,512; default: 24 to 8192.")] = None,
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

    from .cuda import CudaMachine, layers_that_fit, moe_files, this_gpu, this_machine, versions
    from .problem import TUNED
    from .run import parse_tokens, tune
    from .session import About, Place
    from .space import EFFORTS

    if effort not in EFFORTS:
        raise SettingsError(f"--effort: {effort!r} is not known: use {', '.join(EFFORTS)}.")
    counts = TUNED if tokens is None else parse_tokens(tokens)
    problem = _problem(_spec(model), tp, ep, dtype)
    gpu = this_gpu()
    place = Place(out, state)
    about = About(versions(moe_files()), this_machine())

    def machine() -> CudaMachine:
        return CudaMachine(problem, gpu, layers_that_fit(problem), torch.device("cuda", torch.cuda.current_device()))

    try:
        path, _ = tune(gpu, problem, effort, counts, place, about, machine, Console(stderr=True))
    except KeyboardInterrupt:
        raise _stopped(place.state_path(gpu, problem.file_name)) from None
    print(path)
    print(f"Serve with it: QWEN3NEXT_MOE_CONFIGS={out.absolute()}")


@tune_app.command()
def gdn(
    model: Annotated[Path | None, _MODEL] = None,
    tp: Annotated[int, typer.Option(min=1, help="Tensor-parallel size: each GPU has a share of the heads.")] = 1,
    heads: Annotated[str | None, typer.Option(help="Key and value heads of one GPU, e.g. 16/32, instead.")] = None,
    engine: Annotated[
        str | None,
        typer.Option(help="Whose prefills to compare: vllm, sglang or none; default: as installed."),
    ] = None,
    effort: Annotated[str, typer.Option(help="quick, default or thorough.")] = "default",
    out: Annotated[Path, typer.Option(help="Where <gpu>/gdn.json goes.")] = Path("gdn-configs"),
    state: Annotated[
        Path | None, typer.Option(help="What was measured so far; default: beside the file. Taken up if it is there.")
    ] = None,
) -> None:
    """Measure who prefills which shapes fastest, and Gated DeltaNet's tiles, and write the table for this GPU.

    Interrupted and taken up again as `tune moe`. Afterwards serve with QWEN3NEXT_GDN_CONFIGS=<out>.
    """
    import torch
    from rich.console import Console

    from qwen3next_plugin.kernels.gdn.config import FILE

    from .cuda import this_gpu, this_machine, versions
    from .gdn.engines import engine_here, engine_versions, offer
    from .gdn.machine import CudaGdnMachine, gdn_files, with_heads
    from .gdn.run import tune_gdn
    from .gdn.space import EFFORTS, heads_of
    from .session import About, Place

    if effort not in EFFORTS:
        raise SettingsError(f"--effort: {effort!r} is not known: use {', '.join(EFFORTS)}.")
    spec = _spec(model)
    share = heads_of(spec, tp, heads)
    name, gpu, place = engine_here(engine), this_gpu(), Place(out, state)
    about = About(versions(gdn_files()) | engine_versions(name), this_machine(), date.today().isoformat())

    def machine() -> CudaGdnMachine:
        device = torch.device("cuda", torch.cuda.current_device())
        return CudaGdnMachine(with_heads(spec, share), name, device, lambda: offer(name))

    try:
        path, _ = tune_gdn(gpu, share, name, effort, place, about, machine, Console(stderr=True))
    except KeyboardInterrupt:
        raise _stopped(place.state_path(gpu, FILE)) from None
    print(path)
    print(f"Serve with it: QWEN3NEXT_GDN_CONFIGS={out.absolute()}")


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


def _stopped(state: Path) -> typer.Exit:
    """What Ctrl-C leaves."""
    print(f"qwen3next: stopped; {state} keeps what was measured: run the same command again.", file=sys.stderr)
    return typer.Exit(INTERRUPTED)


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
