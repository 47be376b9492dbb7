"""`qwen3next tune` as a user runs it: exit codes, sentences, files."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from qwen3next_plugin import cli
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.tune import cuda
from qwen3next_plugin.tune.problem import Problem
from tests.cpu.tune.fakes import H200, FakeMachine


def invoke(*arguments: str) -> Result:
    result = CliRunner().invoke(cli.app, ["tune", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[FakeMachine]:
    """An H200 that answers at once; every machine that was made for it."""
    made: list[FakeMachine] = []

    def machine(problem: Problem, gpu: Gpu, layers: int, device: torch.device) -> FakeMachine:
        made.append(FakeMachine(problem, gpu, noise=0.2))
        return made[-1]

    replaced: dict[str, Callable[..., object]] = {
        "this_gpu": lambda: H200,
        "layers_that_fit": lambda problem: 1,
        "CudaMachine": machine,
    }
    for name, value in replaced.items():
        monkeypatch.setattr(cuda, name, value)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return made


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("what", ["moe", "gdn"])
def test_without_a_gpu_it_is_one_sentence_and_exit_code_2(what: str) -> None:
    program = "from qwen3next_plugin.cli import main; main()"
    run = subprocess.run([sys.executable, "-c", program, "tune", what], capture_output=True, text=True)
    assert (run.returncode, run.stdout, run.stderr.count("\n")) == (2, "", 1)
    assert run.stderr.startswith("qwen3next: There is no NVIDIA GPU here") and "run it there" in run.stderr


def test_a_tuning_prints_its_file_and_how_to_serve_with_it(machines: list[FakeMachine], tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = invoke("moe", "--out", str(out), "--tokens", "1,64", "--effort", "quick", "--tp", "8")
    path = out / "h200" / "E=512,H=2048,I=64,dtype=float8_e4m3fn.json"
    assert first.exit_code == 0 and first.stdout.splitlines() == [
        str(path),
        f"Serve with it: QWEN3NEXT_MOE_CONFIGS={out}",
    ]
    assert "64 tokens: " in first.stderr
    again = invoke("moe", "--out", str(out), "--tokens", "1,64", "--effort", "quick", "--tp", "8")
    assert again.exit_code == 0 and machines[0].answered and not machines[1].answered


def test_the_shape_and_format_come_from_config_json(machines: list[FakeMachine], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config_of("80b") | {"num_experts": 128}))
    options = ("--model", str(tmp_path), "--out", str(tmp_path / "out"), "--tokens", "1", "--effort", "quick")
    assert invoke("moe", *options, "--ep", "2").exit_code == 0
    assert machines[0].problem == Problem(64, 128, 10, 2048, 512, "bf16")
    assert invoke("moe", *options, "--dtype", "fp8").exit_code == 0
    assert machines[1].problem.mode == "fp8"
    (tmp_path / "config.json").write_text(json.dumps(config_of("80b", quantization="awq")))
    with pytest.raises(PluginError, match=r"--model is awq, .* give one of the two as --dtype"):
        invoke("moe", *options)
    assert invoke("moe", *options, "--dtype", "bf16").exit_code == 0


def test_ctrl_c_says_how_to_go_on(machines: list[FakeMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: FakeMachine, tokens: int, config: object) -> float:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FakeMachine, "error", interrupted)
        stopped = invoke("moe", "--out", str(tmp_path), "--tokens", "1")
    assert stopped.exit_code == 130 and "run the same command again" in stopped.stderr.splitlines()[-1]
    assert invoke("moe", "--out", str(tmp_path), "--tokens", "1").exit_code == 0
    assert [what for what, _, _ in machines[1].answered] == ["error"], "all times were known"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--effort", "huge"), "--effort: 'huge' is not known: use quick, default, thorough."),
        (("--tokens", "x"), "--tokens: 'x'"),
        (("--tp", "2", "--ep", "2"), "give one of the two"),
        (("--tp", "3"), "size 3 does not divide moe_intermediate_size"),
        (("--dtype", "int4"), "--dtype: 'int4' is not known: use bf16 or fp8."),
        (("--model", "nowhere"), "nowhere"),
        (("--out", "/dev/null/x"), "cannot be written"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: tuple[str, ...], words: str, machines: list[FakeMachine], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError) as caught:
        invoke("moe", *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value)
    assert not any(machine.answered for machine in machines)
