"""A server whose main process is sound while SGLang differs in its children: it ends, and leaves none of them behind.

What the main process finds wrong is in tests/e2e/test_refusals.py. SGLang loads plugins anew in every child, and only
there may something be missing: another file system, a file replaced while the server starts.
"""

import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import sglang

from qwen3next_plugin.demo.random import write_random_checkpoint

GDN_BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
SITE = f"""
import importlib.abc, importlib.util, multiprocessing, sys

class Renamed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != {GDN_BACKEND!r} or multiprocessing.parent_process() is None:
            return None
        sys.meta_path.remove(self)
        with open(importlib.util.find_spec(name).origin) as file:
            source = file.read().replace("class GDNAttnBackend(", "class GatedDeltaNetBackend(")
        copy = __file__ + ".copy.py"
        with open(copy, "w") as file:
            file.write(source)
        return importlib.util.spec_from_file_location(name, copy)

sys.meta_path.insert(0, Renamed())
"""


def processes_of(session: int) -> list[int]:
    """The living processes of a session, by the number of its first."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            state, _, _, number = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
        except (OSError, ValueError):
            continue
        if int(number) == session and state != "Z":
            found.append(int(entry.name))
    return found


def gone(session: int, seconds: float) -> bool:
    """Whether a session's last process ends in time; those told to end may need a moment."""
    end = time.monotonic() + seconds
    while processes_of(session):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def launch(checkpoint: Path) -> list[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    command += ["--attention-backend", "torch_native", "--host", "127.0.0.1", "--port", port]
    return [*command, "--max-total-tokens", "512", "--max-mamba-cache-size", "16", "--max-running-requests", "2"]


def test_the_server_ends_with_its_children(tmp_path: Path) -> None:
    checkpoint = write_random_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    (tmp_path / "sitecustomize.py").write_text(SITE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QWEN3NEXT_", "SGLANG_"))}
    environment |= {"PYTHONPATH": str(tmp_path), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    with (tmp_path / "log").open("w+") as log:
        server = subprocess.Popen(
            launch(checkpoint),
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = server.wait(600)
            assert gone(server.pid, 10)
        finally:
            for process in processes_of(server.pid):
                os.kill(process, 9)
        log.seek(0)
        output = log.read()
    assert code not in (0, None), output
    assert "Traceback" not in output, output
    # The detokenizer of 0.5.23 loads plugins too, and says the same as the scheduler.
    (sentence,) = {line for line in output.splitlines() if line.startswith("qwen3next-plugin: ")}
    assert f"{GDN_BACKEND}.GDNAttnBackend is gone in sglang {sglang.__version__}" in sentence
    assert sentence.endswith("QWEN3NEXT_PLUGIN=0 to run the stock engine.")
