"""`qwen3next doctor --kernels`: the table of what runs, as text and as JSON."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from qwen3next_plugin import cli
from qwen3next_plugin.doctor import kernels
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gpus import target_named
from qwen3next_plugin.settings import read_settings
from tests.cpu.tune.gdn_fakes import FakeGdnMachine
from tests.cpu.tune.gdn_fakes import run as gdn_run


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["doctor", "--kernels", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_line_a_row_of_the_dispatch_table() -> None:
    first, *lines = run("--gpu", "h200").splitlines()
    assert first == "What runs on NVIDIA H200:"
    rows = dispatch.table(target_named("h200"))
    told = [(line, rest.count("\n")) for line, _, rest in (block.partition("\n") for block in _blocks(lines))]
    assert len(told) == len(rows)
    for (line, details), row in zip(told, rows, strict=True):
        assert line.startswith(f"{row.operation}: {row.choice.shapes} -> {row.choice.runs}")
        assert row.choice.why in line and row.choice.tiles in line and details == len(row.choice.details)


def _blocks(lines: list[str]) -> list[str]:
    """A line a row of the table, with the indented ones that follow it."""
    blocks: list[str] = []
    for line in lines:
        if line.startswith("  "):
            blocks[-1] += line + "\n"
        else:
            blocks.append(line + "\n")
    return blocks


def test_what_a_file_decides_of_gated_deltanet_is_told_with_its_reasons(tmp_path: Path) -> None:
    shown = run("--gpu", "h100")
    assert "tiles: sm90/gdn.json, in part predictions; `qwen3next tune gdn` measures" in shown
    assert "  float32 states, from 256 programs on: 2048 elements, 2 warps (measured on an H100" in shown
    assert "  16-bit states, from 1024 programs on: 1024 elements, 2 warps, 5 stages (a prediction, not" in shown
    assert (
        "  16-bit states, up to 4 tokens a row, from 0 programs on: all tokens at once, 128 rows, 4 warps (a pre"
        in shown
    )
    assert (
        "  float32 states, up to 2 tokens a row, from 0 programs on: token by token, 128 rows, 8 warps (a pre" in shown
    )
    assert "gdn_prefill: from 512 tokens on, 64 a row -> flashinfer" in shown
    assert "  a prediction, not measured: what others publish for an H200" in shown
    assert "any/gdn.json" in run("--gpu", "l40s")
    assert "any/gdn.json" in run("--gpu", "a100") and "by merging" not in run("--gpu", "a100")
    measured = run("--gpu", "h200")
    assert "gdn_prefill: bfloat16 tokens, heads of 64 or 128 -> triton (three kernels over tiles" in measured
    assert "gdn_prefill: bfloat16 tokens, heads of another multiple of 64 -> triton (two kernels" in measured
    assert "from the first token on: own, inverse by merging, 4 warps, 168 registers, 3 stages (measured on" in measured
    assert (
        "tiles: h200/gdn.json" in measured
        and "(measured on NVIDIA H200 with 16/32 heads, 2026-11-27: 2 shapes" in measured
    )


def test_a_users_table_is_shown_as_his(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gdn_run(tmp_path, FakeGdnMachine())
    monkeypatch.setenv("QWEN3NEXT_GDN_CONFIGS", str(tmp_path))
    try:
        shown = run("--gpu", "h200")
    finally:
        monkeypatch.delenv("QWEN3NEXT_GDN_CONFIGS")
        read_settings().tell_kernels()
    assert "tiles: h200/gdn.json, measured by you)" in shown
    assert "gdn_prefill: from 2048 tokens on, 64 a row -> flashinfer" in shown
    assert "1.12 to 2.23 times as fast as our own kernels" in shown


def test_json_holds_the_same() -> None:
    told = json.loads(run("--gpu", "a100", "--json"))
    assert told["device"] == "NVIDIA A100-SXM4-80GB"
    assert [entry["operation"] for entry in told["operations"]] == [
        row.operation for row in dispatch.table(target_named("a100"))
    ]
    assert all(
        entry.keys() == {"operation", "shapes", "runs", "why", "tiles", "details"} for entry in told["operations"]
    )


def test_the_device_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "present", lambda: None)
    assert run().startswith("What runs on a CPU (no GPU is here; --gpu NAME shows another):")
    monkeypatch.setattr(dispatch, "present", lambda: target_named("l40s"))
    assert run().startswith("What runs on NVIDIA L40S:")


def test_settings_are_those_of_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QWEN3NEXT_KERNELS", "reference")
    try:
        assert "fused_moe: all -> reference (plain torch, as was asked for)" in run("--gpu", "h200")
    finally:
        dispatch.prefer(None)
    monkeypatch.setenv("QWEN3NEXT_PLUGIN", "0")
    with pytest.raises(SettingsError, match="QWEN3NEXT_PLUGIN is 0: .* unset it"):
        kernels.print_kernels("h200", False)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--gpu", "h200"], "--gpu is about kernels"), (["--kernels", "--gpu", "h300"], "--gpu: 'h300' is no GPU known")],
)
def test_what_cannot_be_answered(arguments: list[str], said: str) -> None:
    done = CliRunner().invoke(cli.app, ["doctor", *arguments])
    assert isinstance(done.exception, SettingsError) and said in str(done.exception)


def test_a_terminal_names_an_operation_once(capsys: pytest.CaptureFixture[str]) -> None:
    from rich.console import Console

    Console(width=200).print(kernels._as_table(dispatch.table(target_named("h200"))))
    shown = capsys.readouterr().out
    assert shown.count("fused_moe") == 1 and shown.count("quantized_matmul") >= 2
