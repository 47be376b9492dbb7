"""`qwen3next demo-checkpoint` as a user types it."""

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.cli import main


@dataclass(frozen=True)
class Done:
    returncode: int
    stdout: str
    stderr: str


Run = Callable[..., Done]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command line in this process: importing torch anew for each case would take most of the time."""

    def call(*arguments: str | Path) -> Done:
        monkeypatch.setattr(sys, "argv", ["qwen3next", "demo-checkpoint", *map(str, arguments)])
        code = 0
        try:
            main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return call


def test_copies_the_shipped_model_and_says_how_to_go_on(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path / "new" / "demo")
    assert done.returncode == 0, done.stderr
    assert f"vllm serve {tmp_path / 'new' / 'demo'}" in done.stdout
    assert (tmp_path / "new" / "demo" / "model.safetensors").stat().st_size > 1_000_000


def test_random_weights(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path, "--random", "--shape", "ratio4", "--dtype", "float32", "--seed", "3")
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "config.json").read_text())["torch_dtype"] == "float32"
    assert "ratio4 (random weights)" in done.stdout
    assert run(tmp_path / "awq", "--random", "--quantization", "awq").returncode == 0
    assert json.loads((tmp_path / "awq" / "config.json").read_text())["quantization_config"]["quant_method"] == "awq"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--random", "--shape", "huge"], "shape: 'huge' is not known: use one of tiny"),
        (["--random", "--train"], "--train and --random exclude each other"),
        (["--shape", "tiny"], "give --random with them"),
        (["--fp8"], "give --random with them"),
        (["--quantization", "awq"], "give --random with them"),
        (["--random", "--fp8", "--quantization", "awq"], "--quantization is awq and --fp8 says fp8"),
        (["--random", "--quantization", "q4_k"], "quantization: 'q4_k' is not known: use one of fp8, awq, gptq"),
        (["--random", "--dtype", "int8"], "dtype: 'int8' cannot be written"),
        (["--train", "--device", "tpu"], "--device: 'tpu' is not here: use cpu"),
    ],
)
def test_one_sentence_and_nothing_written(run: Run, arguments: list[str], sentence: str, tmp_path: Path) -> None:
    done = run(tmp_path / "x", *arguments)
    assert done.returncode == 2 and done.stdout == ""
    assert sentence in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (tmp_path / "x").exists()


def test_a_file_is_no_directory(run: Run, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("mine")
    done = run(tmp_path / "x")
    assert done.returncode == 2 and "is a file: give a directory" in done.stderr
    assert (tmp_path / "x").read_text() == "mine"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_training_names_the_device_it_misses(run: Run, tmp_path: Path) -> None:
    done = run(tmp_path / "x", "--train")
    assert done.returncode == 2 and "--device: 'cuda' is not here: use cpu." in done.stderr
