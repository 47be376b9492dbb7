"""The `qwen3next` command as a user runs it: exit codes, streams, no tracebacks."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import typer

from qwen3next_plugin import cli
from qwen3next_plugin.activation import plugin_version
from qwen3next_plugin.errors import DriftError
from tests.configs import new_form
from tests.cpu.core.checkpoints import random_checkpoint, small_spec
from tests.cpu.core.test_checkpoint import write

COMMAND = [sys.executable, "-c", "from qwen3next_plugin.cli import main; main()"]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    # A wide terminal keeps typer from wrapping its help.
    environment = os.environ | {"COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, env=environment, timeout=120)


def test_version_and_help_do_not_wait_for_torch() -> None:
    assert run("--version").stdout == f"qwen3next-plugin {plugin_version()}\n"
    loaded = "import sys, qwen3next_plugin.cli; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", loaded], capture_output=True, text=True).stdout == "False\n"
    text = run("--help").stdout
    assert "check" in text and "QWEN3NEXT_PLUGIN" in text


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    write(tmp_path, random_checkpoint(small_spec()))
    (tmp_path / "config.json").write_text(json.dumps(new_form()))
    return tmp_path


def test_check_says_what_a_good_checkpoint_holds(checkpoint: Path) -> None:
    found = run("check", str(checkpoint))
    assert (found.returncode, found.stderr) == (0, "")
    assert "is complete: 4 layers (3 linear, 1 full attention), 8 experts, 2 a token, with MTP layer" in found.stdout


def test_check_fails_with_one_sentence(checkpoint: Path) -> None:
    file = sorted(checkpoint.glob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:-5])
    truncated = run("check", str(checkpoint))
    (checkpoint / "config.json").write_text(json.dumps(new_form(head_dim=33)))
    broken = run("check", str(checkpoint))
    for found, name in ((truncated, file.name), (broken, "head_dim")):
        assert (found.returncode, found.stdout) == (1, "")
        assert name in found.stderr and found.stderr.count("\n") == 1 and "Traceback" not in found.stderr


def test_any_other_refusal_is_one_sentence_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    refusing = typer.Typer(name="qwen3next", pretty_exceptions_enable=False)

    @refusing.command()
    def fail() -> None:
        raise DriftError("something is gone: install another one.")

    monkeypatch.setattr(cli, "app", refusing)
    monkeypatch.setattr(sys, "argv", ["qwen3next"])
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert capsys.readouterr().err == "qwen3next: something is gone: install another one.\n"
