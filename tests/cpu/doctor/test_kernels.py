"""`qwen3next doctor --kernels`: the table of what runs, as text and as JSON."""

import json

import pytest
from typer.testing import CliRunner

from qwen3next_plugin import cli
from qwen3next_plugin.doctor import kernels
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gpus import target_named


def run(*arguments: str) -> str:
    done = CliRunner().invoke(cli.app, ["doctor", "--kernels", *arguments])
    assert done.exit_code == 0, done.output
    return done.stdout


def test_a_line_a_row_of_the_dispatch_table() -> None:
    first, *lines = run("--gpu", "h200").splitlines()
    assert first == "What runs on NVIDIA H200:"
    rows = dispatch.table(target_named("h200"))
    assert len(lines) == len(rows)
    for line, row in zip(lines, rows, strict=True):
        assert line.startswith(f"{row.operation}: {row.choice.shapes} -> {row.choice.runs}")
        assert row.choice.why in line and row.choice.tiles in line


def test_json_holds_the_same() -> None:
    told = json.loads(run("--gpu", "a100", "--json"))
    assert told["device"] == "NVIDIA A100-SXM4-80GB"
    assert [entry["operation"] for entry in told["operations"]] == [
        row.operation for row in dispatch.table(target_named("a100"))
    ]
    assert all(entry.keys() == {"operation", "shapes", "runs", "why", "tiles"} for entry in told["operations"])


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
