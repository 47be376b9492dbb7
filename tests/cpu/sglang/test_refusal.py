"""How a server ends over what this plugin finds wrong in one of its processes, and over anything else."""

import subprocess
import sys
from pathlib import Path

import pytest

from qwen3next_plugin.refusal import EXIT_CODE

SENTENCE = "qwen3next-plugin: model.norm.weight has shape [1]: take another checkpoint."
ENDED_BY_ITS_CHILD = 3
# A main process and a child that loads a model, as SGLang's do: the child logs exceptions and sends SIGQUIT.
MAIN = f"""
import multiprocessing, os, signal, sys, traceback
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.sglang_integration.refusal import refusing

ERRORS = {{"ours": WeightError({SENTENCE.partition(": ")[2]!r}), "another": KeyError("an accident")}}

@refusing
def load(kind):
    print("Loading   0%", end="", file=sys.stderr)
    raise ERRORS[kind]

def schedule(kind):
    try:
        load(kind)
    except Exception:
        traceback.print_exc()
        os.kill(os.getppid(), signal.SIGQUIT)

if __name__ == "__main__":
    signal.signal(signal.SIGQUIT, lambda *_: os._exit({ENDED_BY_ITS_CHILD}))
    child = multiprocessing.get_context("spawn").Process(target=schedule, args=sys.argv[1:])
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def ending(folder: Path, name: str, kind: str) -> tuple[int, list[str]]:
    """Exit code and standard error's lines of a command ``name``, in whose child that kind of error happens."""
    (folder / name).write_text(MAIN)
    done = subprocess.run([sys.executable, folder / name, kind], capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr.splitlines()


def test_an_error_of_ours_is_one_sentence(tmp_path: Path) -> None:
    assert ending(tmp_path, "sglang", "ours") == (ENDED_BY_ITS_CHILD, ["Loading   0%", SENTENCE])


def test_another_error_keeps_its_traceback(tmp_path: Path) -> None:
    code, lines = ending(tmp_path, "sglang", "another")
    assert code == ENDED_BY_ITS_CHILD
    assert any(line.endswith("Traceback (most recent call last):") for line in lines)
    assert lines[-1] == "KeyError: 'an accident'"
    assert not any("qwen3next-plugin: " in line for line in lines)


def test_a_program_outlives_the_child_that_it_started(tmp_path: Path) -> None:
    assert ending(tmp_path, "program", "ours") == (EXIT_CODE, ["Loading   0%", SENTENCE])


@pytest.mark.parametrize("name", ["sglang", "program"])
def test_in_the_main_process_only_a_command_ends(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(MAIN.partition("if __name__")[0] + "load('ours')\n")
    done = subprocess.run([sys.executable, tmp_path / name], capture_output=True, text=True, timeout=300)
    assert (done.returncode, "Traceback" in done.stderr) == ((EXIT_CODE, False) if name == "sglang" else (1, True))
    assert SENTENCE.partition(": ")[2] in done.stderr
