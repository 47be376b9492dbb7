"""`make serve` against a stand-in engine: ready, answer, stop, failure; nothing is left running."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

STAND_IN = """#!{python}
import http.server, json, os, subprocess, sys, time
mode = open(os.path.join(os.path.dirname(__file__), "mode")).read()
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], stderr=subprocess.DEVNULL)
print("child", child.pid, flush=True)
if mode == "dies":
    print("ValueError: no such architecture", flush=True)
    sys.exit(3)
print("Starting to load model", sys.argv[2], flush=True)
if mode != "stock":
    print("INFO qwen3next-plugin 0.1.0 active: vllm 0.32.0; kernels: none", flush=True)
class Api(http.server.BaseHTTPRequestHandler):
    def reply(self, value):
        body = json.dumps(value).encode()
        self.send_response(400 if mode == "refuses" and self.command == "POST" else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
    def do_GET(self):
        self.reply({{"data": [{{"id": "stand-in"}}]}})
    def do_POST(self):
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.reply({{"choices": [{{"message": {{"content": "You said: " + asked["messages"][0]["content"]}}}}]}})
    def log_message(self, *arguments): pass
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Api).serve_forever()
"""


class Stand:
    """A folder that looks like an engine's environment, and a checkpoint for it."""

    def __init__(self, folder: Path, mode: str, engine: str = "vllm") -> None:
        binaries = folder / "bin"
        binaries.mkdir()
        if engine == "vllm":  # `vllm serve MODEL …`
            program = binaries / "vllm"
            (binaries / "python").symlink_to(sys.executable)
        else:  # `python -m sglang.launch_server --model-path MODEL …`
            program = binaries / "python"
            (binaries / "sglang").touch()
        program.write_text(STAND_IN.format(python=sys.executable))
        program.chmod(0o755)
        (binaries / "mode").write_text(mode)
        (folder / "config.json").write_text("{}")
        self.folder = folder

    def start(self, **variables: str) -> "subprocess.Popen[str]":
        """`make serve` without make: as its own group, so that it alone gets the signals."""
        own = {"USE_ENV": str(self.folder), "MODEL": str(self.folder), "DEVICE": "cpu", "QUESTION": "Hello?"}
        return subprocess.Popen(
            [sys.executable, "-m", "qwen3next_plugin.serve"],
            cwd=ROOT,
            env={**os.environ, **own, **variables},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )


def child_on(port: str) -> int:
    """The process that the stand-in on this port started, read from its log."""
    log = ROOT / ".venv" / f"serve-{port}.log"
    return next(int(line.split()[1]) for line in log.read_text().splitlines() if line.startswith("child"))


def is_alive(pid: int) -> bool:
    """True for a living process (a zombie that nobody has reaped is not one)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.fixture
def port(free_port: int) -> str:
    return str(free_port)


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_once_asks_prints_the_answer_and_leaves_nothing_running(tmp_path: Path, port: str, engine: str) -> None:
    process = Stand(tmp_path, "good", engine).start(ONCE="1", PORT=port, ENGINE=engine)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    assert "qwen3next-plugin 0.1.0 active" in output
    assert "Question: Hello?" in output and "Answer:   You said: Hello?" in output
    assert not is_alive(child_on(port))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_stays_up_until_it_is_told_to_stop(tmp_path: Path, port: str, number: int) -> None:
    process = Stand(tmp_path, "good").start(PORT=port)
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line)
        if "Ctrl-C" in line:
            break
    output = "".join(lines)
    assert f"curl http://127.0.0.1:{port}/v1/chat/completions" in output and '"model": "stand-in"' in output
    assert "from openai import OpenAI" in output and f"serve-{port}.log" in output
    child = child_on(port)
    assert is_alive(child)
    process.send_signal(number)
    rest, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "Stopping the server" in rest
    assert not is_alive(child)


@pytest.mark.parametrize(
    ("mode", "sentence"),
    [
        ("dies", "FAILED: The engine ended with exit code 3 before it was ready: ValueError: no such architecture"),
        ("stock", "FAILED: The engine is up, but the plugin is not active: is it a Qwen3-Next?"),
        ("refuses", "FAILED: The server refused /v1/chat/completions with 400"),
    ],
)
def test_a_failure_is_one_sentence_and_leaves_nothing_running(
    tmp_path: Path, port: str, mode: str, sentence: str
) -> None:
    process = Stand(tmp_path, mode).start(ONCE="1", PORT=port)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and sentence in output.splitlines()[-1]
    assert mode != "dies" or "ValueError: no such architecture" in output  # the end of the log
    assert "Traceback" not in output
    assert not is_alive(child_on(port))


def test_the_kill_switch_is_named_and_not_taken_for_a_failure(tmp_path: Path, port: str) -> None:
    process = Stand(tmp_path, "stock").start(ONCE="1", PORT=port, QWEN3NEXT_PLUGIN="0")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "QWEN3NEXT_PLUGIN=0: this is the stock engine" in output


def test_an_engine_that_never_gets_ready_is_given_up(tmp_path: Path, port: str) -> None:
    stand = Stand(tmp_path, "good")
    (tmp_path / "bin" / "vllm").write_text("#!/bin/sh\necho child $$\nexec sleep 600\n")
    began = time.monotonic()
    process = stand.start(ONCE="1", PORT=port, TIMEOUT="2")
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 1 and "was not ready after 2 s" in output
    assert time.monotonic() - began < 30 and not is_alive(child_on(port))


def test_make_passes_its_variables_on(tmp_path: Path, port: str) -> None:
    Stand(tmp_path, "good")
    own = [f"USE_ENV={tmp_path}", f"MODEL={tmp_path}", f"PORT={port}", "ONCE=1", "DEVICE=cpu", 'QUESTION=What\'s "up"?']
    command = ["make", "serve", f"PYTHON={sys.executable}", *own]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'Answer:   You said: What\'s "up"?' in done.stdout


def test_the_bootstrap_runs_on_the_standard_library_alone() -> None:
    command = [sys.executable, "-S", "-c", "import qwen3next_plugin.serve.__main__, sys; print(sorted(sys.modules))"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "torch" not in done.stdout and "rich" not in done.stdout
