"""The `qwen3next` command. A failure is one sentence on standard error and a non-zero exit, never a traceback."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .activation import DISTRIBUTION, plugin_version
from .bench.command import bench_app
from .demo.command import demo_checkpoint
from .doctor.command import doctor
from .errors import ConfigError, PluginError, WeightError
from .settings import settings_help
from .tune.command import tune_app

FOUND_WRONG = 1  # `check` did its work and the checkpoint is not fit to serve
FAILED = 2  # the command could not do its work

app = typer.Typer(
    name="qwen3next",
    help="Qwen3-Next inside vLLM and SGLang: checks and tools around the plugin.",
    epilog="Environment: " + settings_help(),
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run the command line; the console script's entry point."""
    try:
        app()
    except PluginError as error:
        print(f"{app.info.name}: {error}", file=sys.stderr)
        sys.exit(FAILED)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"{DISTRIBUTION} {plugin_version()}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Options that stand before the command."""


app.command("demo-checkpoint")(demo_checkpoint)
app.command()(doctor)
app.add_typer(bench_app, name="bench")
app.add_typer(tune_app, name="tune")


@app.command()
def check(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Directory with config.json and *.safetensors.")],
) -> None:
    """Check a checkpoint's config.json and file headers; reads no weights. Exits with 1 if something is wrong."""
    # Imported here, so that --help and --version do not wait for torch.
    from .config import LayerKind, load_spec
    from .weights import check_checkpoint

    try:
        spec = load_spec(directory)
        summary = check_checkpoint(directory, spec)
    except (ConfigError, WeightError) as error:
        print(error, file=sys.stderr)
        raise typer.Exit(FOUND_WRONG) from None
    full = spec.layer_kinds.count(LayerKind.FULL)
    parts = [
        f"{spec.num_layers} layers ({spec.num_layers - full} linear, {full} full attention)",
        f"{spec.moe.num_experts} experts, {spec.moe.top_k} a token",
        "with MTP layer" if summary.has_mtp else "without MTP layer",
        f"{summary.num_tensors} tensors in {summary.num_files} file{'s' * (summary.num_files != 1)}",
        f"{summary.num_bytes / 2**30:.1f} GiB"
        if summary.num_bytes >= 2**30
        else f"{summary.num_bytes / 2**20:.1f} MiB",
    ]
    print(f"{directory} is complete: {', '.join(parts)}.")
