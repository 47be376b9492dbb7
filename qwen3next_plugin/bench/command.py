"""``qwen3next bench``: measure, write model folders, check, draw and tabulate results."""

import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from qwen3next_plugin.errors import SettingsError

from .kernels import command as parts

bench_app = typer.Typer(
    help="Measure plugin and stock engine side by side, and look after the result files.",
    invoke_without_command=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


@bench_app.callback()
def bench(
    context: typer.Context,
    model: Annotated[Path | None, typer.Option(help="A folder with config.json: see `qwen3next bench model`.")] = None,
    name: Annotated[str, typer.Option(help="Of the result file: <out>/<gpu>/<name>.json.")] = "run",
    engine: Annotated[str, typer.Option(help="vllm, sglang or both.")] = "vllm",
    against: Annotated[str, typer.Option(help="What to compare with: stock.")] = "stock",
    rows: Annotated[str, typer.Option(help="Names with commas between, or all.")] = "all",
    order: Annotated[str, typer.Option(help="A is stock, B the plugin.")] = "A-B-A",
    repeats: Annotated[int, typer.Option(min=1, help="Of each row in each visit; a result file wants 3.")] = 3,
    steps: Annotated[int, typer.Option(min=20, help="Decoding steps a repeat.")] = 64,
    minutes: Annotated[float | None, typer.Option(help="Begin nothing that would end later than this.")] = None,
    out: Annotated[Path, typer.Option(help="Where result files go.")] = Path("benchmarks/results"),
    state: Annotated[Path | None, typer.Option(help="What was measured so far; taken up again if it is there.")] = None,
    work: Annotated[Path, typer.Option(help="Logs, records and caches of the engines.")] = Path("build/bench"),
    profile: Annotated[str, typer.Option(help="Rows to profile at the end, e.g. decode-b64,prefill-8192.")] = "",
    evidence: Annotated[bool, typer.Option(help="Compare logits with the oracle's, and count experts.")] = True,
    vllm_python: Annotated[str, parts.VLLM_PYTHON] = sys.executable,
    vllm_env: Annotated[Path | None, parts.ENVIRONMENT] = None,
    vllm_args: Annotated[str, typer.Option(help="More vLLM flags, for both sides.")] = "",
    sglang_python: Annotated[str, parts.SGLANG_PYTHON] = sys.executable,
    sglang_env: Annotated[Path | None, parts.ENVIRONMENT] = None,
    sglang_args: Annotated[str, typer.Option(help="More SGLang flags, for both sides.")] = "",
    variables: Annotated[str, typer.Option(help="NAME=VALUE ... for both sides' engines.")] = "",
    commit: Annotated[str | None, typer.Option(help="Git commit, where there is no repository to ask.")] = None,
) -> None:
    """Measure rows on both sides, in the order A-B-A, each side in a process of its own."""
    if context.invoked_subcommand is not None:
        return
    if model is None or not (model / "config.json").is_file():
        raise SettingsError("--model: give a folder with a config.json; `qwen3next bench model DIR` writes one.")
    if against != "stock":
        raise SettingsError(f"--against: {against!r} is not known: use stock.")
    from .engines import EngineSetup, engines_of, words_of
    from .rows import parse_profiles, parse_rows, plan_visits
    from .session import RunFiles, measure_and_write

    extra = dict(pair.split("=", 1) for pair in shlex.split(variables))
    setups = {
        "vllm": EngineSetup(vllm_python, vllm_env, tuple(words_of(vllm_args)), extra),
        "sglang": EngineSetup(sglang_python, sglang_env, tuple(words_of(sglang_args)), extra),
    }
    engines = engines_of(engine)
    visits = plan_visits(engines, order, parse_rows(rows), evidence, parse_profiles(profile))
    plan: dict[str, Any] = {
        "engines": list(engines),
        "order": order,
        "rows": rows,
        "repeats": repeats,
        "steps": steps,
        "prompt_tokens": 1024,
    }
    deadline = None if minutes is None else time.monotonic() + 60 * minutes
    run = RunFiles(name, out, state or out / f"{name}.state.json", work, commit or git_commit(), evidence)
    files = measure_and_write(model, visits, setups, plan, run, deadline)
    for file in files:
        print(file)


def git_commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    git = ["git", "-C", str(root)]
    try:
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changes = subprocess.run([*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return head + ("+changes" if changes.stdout.strip() else "")


bench_app.command("kernels")(parts.kernels)
bench_app.command("moe")(parts.moe)
bench_app.command("both")(parts.both)
bench_app.command("merge")(parts.merge_states)


@bench_app.command("model")
def write_model(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="Made if it is not there.")],
    shape: Annotated[str, typer.Option(help="80b, slice, blocks, tiny ...")] = "80b",
    quantization: Annotated[str, typer.Option(help="fp8 or none (bf16).")] = "fp8",
) -> None:
    """Write config.json and a tokenizer for weights that are made on the GPU: no file of weights is needed."""
    from qwen3next_plugin.demo.random import write_random_checkpoint

    from .prompts import give_every_token_a_text

    if quantization not in ("fp8", "none"):
        raise SettingsError(f"--quantization: {quantization!r} is not known: use fp8 or none.")
    write_random_checkpoint(directory, shape, fp8=quantization == "fp8", weights=False)
    give_every_token_a_text(directory)
    print(f"{directory}: {shape}, {'FP8 in 128x128 blocks' if quantization == 'fp8' else 'bf16'}, no weights.")


@bench_app.command("check")
def check_results(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Result files, or folders of them.")],
) -> None:
    """Refuse result files whose sides differ in more than the plugin, or that leave something out."""
    from .check import check_file, result_files

    found = result_files(files)
    findings = [finding for file in found for finding in check_file(file)]
    for finding in findings:
        print(finding, file=sys.stderr)
    if findings:
        raise typer.Exit(1)
    print(f"{len(found)} file{'s' * (len(found) != 1)} checked, nothing wrong.")


@bench_app.command("plot")
def plot_results(
    files: Annotated[list[Path], typer.Argument(metavar="FILES", help="Result files.")],
    out: Annotated[Path | None, typer.Option(help="The picture; default: beside the file, as PNG.")] = None,
) -> None:
    """Draw result files (needs matplotlib)."""
    from .plot import plot_result

    for file in files:
        print(plot_result(file, out))


@bench_app.command("tables")
def write_tables(
    documents: Annotated[list[Path], typer.Argument(metavar="DOCUMENTS", help="Markdown with bench markers.")],
    check: Annotated[bool, typer.Option("--check", help="Change nothing; exit with 1 where a table is old.")] = False,
) -> None:
    """Write the tables between `<!-- bench: FILE -->` and `<!-- /bench -->` from FILE, beside the document."""
    from .tables import rewrite

    for document in documents:
        old = document.read_text(encoding="utf-8")
        new = rewrite(old, document.parent)
        if check and new != old:
            print(
                f"{document}: tables are older than their files: `qwen3next bench tables {document}`.", file=sys.stderr
            )
            raise typer.Exit(1)
        if new != old:
            document.write_text(new, encoding="utf-8")
