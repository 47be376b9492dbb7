"""What runs of `qwen3next bench` against a stand-in for the engine share."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from qwen3next_plugin.cli import app

ROWS = "decode-b1,decode-b3,prefill-256,cold-start,warm-start"

Bench = Callable[..., Any]


@pytest.fixture(scope="session")
def python(tmp_path_factory: pytest.TempPathFactory) -> str:
    """An interpreter whose engines are stand-ins."""
    wrapper = tmp_path_factory.mktemp("bin") / "python"
    wrapper.write_text(f'#!/bin/sh\nexec {sys.executable} {Path(__file__).with_name("fake_engine.py")} "$@"\n')
    wrapper.chmod(0o755)
    return str(wrapper)


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model")
    done = CliRunner().invoke(app, ["bench", "model", str(directory), "--shape", "tiny", "--quantization", "none"])
    assert done.exit_code == 0, done.output
    assert not list(directory.glob("*.safetensors"))
    return directory


@pytest.fixture(scope="session")
def bench(model: Path, python: str) -> Bench:
    """`bench(directory, *flags)` runs the command into ``directory``; returns click's result."""

    def run(directory: Path, *more: str) -> Any:
        given = ["--model", str(model), "--vllm-python", python, "--out", str(directory / "results"), "--rows", ROWS]
        given += ["--work", str(directory / "work"), "--steps", "24", "--commit", "0" * 40, "--name", "try", *more]
        return CliRunner().invoke(app, ["bench", *given])

    return run
