"""`qwen3next doctor` as a user or a program runs it."""

import io
import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from rich.console import Console
from typer.testing import CliRunner

from qwen3next_plugin import cli
from qwen3next_plugin.demo.command import copy_shipped
from qwen3next_plugin.doctor import command, engines
from qwen3next_plugin.doctor.checkpoint import WITH_MTP
from qwen3next_plugin.doctor.finding import error, ok
from qwen3next_plugin.doctor.surroundings import Surroundings
from tests.cpu.doctor.places import Place
from tests.helpers import engine_environment


@pytest.mark.parametrize("as_json", [False, True])
def test_exit_code_and_lines(as_json: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = Place(tmp_path)
    monkeypatch.setattr(command, "Surroundings", lambda checkpoint: place.surroundings())
    arguments = ["doctor", *(["--json"] if as_json else [])]
    good = CliRunner().invoke(cli.app, arguments)
    place.uninstall("torch")
    bad = CliRunner().invoke(cli.app, arguments)
    assert (good.exit_code, bad.exit_code) == (0, 1)
    if as_json:
        told = json.loads(bad.stdout)
        assert told["errors"] == 1 and told["warnings"] == 0
        (finding,) = (finding for finding in told["findings"] if finding["level"] == "error")
        assert finding.keys() == {"level", "check", "found", "remedy"} and "torch" in finding["found"]
    else:
        assert "error   installed: torch is not installed -> install the engine again" in bad.stdout.splitlines()[1]
        assert good.stdout.splitlines()[-1] == "0 error(s), 0 warning(s)"


def test_one_line_whatever_is_in_it() -> None:
    assert command.as_line(error("x", "two\nlines", "do\nthis")) == "error   x: two lines -> do this"


def test_a_narrow_terminal_cuts_nothing_off() -> None:
    shown = io.StringIO()
    Console(file=shown, width=60).print(command.as_table([ok("x", "[red]no markup"), error("y", "z", "w" * 200)]))
    assert shown.getvalue().count("w") == 200 and "[red]" in shown.getvalue()


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_the_real_environment_without_torch_in_its_process(engine: str) -> None:
    if find_spec(engine) is None:
        pytest.skip(f"asks the real {engine}")
    script = "import sys; from qwen3next_plugin.cli import main\ntry: main()\nfinally: print('torch' in sys.modules)"
    result = subprocess.run(
        [sys.executable, "-P", "-c", script, "doctor"],
        capture_output=True,
        text=True,
        env=engine_environment(OMP_NUM_THREADS="1"),
        timeout=600,
    )
    lines = result.stdout.splitlines()
    active = [line for line in lines if line.startswith(f"ok      {engine}: ")]
    assert active and "is active" in active[0] and f"qwen3next_plugin.{engine}_integration.model" in active[0], result
    assert lines[-1] == "False"


@pytest.mark.skipif(find_spec("sglang") is None, reason="asks the real SGLang")
def test_the_kill_switch_is_seen_in_the_real_sglang() -> None:
    place = Surroundings(environ=engine_environment(OMP_NUM_THREADS="1", QWEN3NEXT_PLUGIN="0"))
    (finding,) = engines.sglang_activity(place)
    assert finding.level == "warning" and "is stock: Qwen3NextForCausalLM is sglang.srt.models" in finding.found


def test_the_words_that_the_doctor_looks_for_in_what_check_says(tmp_path: Path) -> None:
    copy_shipped(tmp_path)
    assert WITH_MTP in CliRunner().invoke(cli.app, ["check", str(tmp_path)]).stdout
