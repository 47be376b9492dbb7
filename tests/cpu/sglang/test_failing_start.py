"""Servers that must not start: `python -m sglang.launch_server` ends with a sentence, an exit code and no process left.

Each starts with modules replaced by copies in which one name is another, as the next version of SGLang may have it.
"""

import os
import socket
import subprocess
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
import sglang

from qwen3next_plugin.demo.random import write_random_checkpoint

SECONDS = 400
GDN_BACKEND = "sglang.srt.layers.attention.linear.gdn_backend"
# Imports a changed copy of a module in place of the module, in every process or in SGLang's children alone.
SITE = """
import importlib.abc, importlib.util, multiprocessing, sys

class Changed(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != {module!r} or ({children_only!r} and multiprocessing.parent_process() is None):
            return None
        sys.meta_path.remove(self)
        origin = importlib.util.find_spec(name).origin
        with open(origin) as file:
            source = file.read().replace({old!r}, {new!r})
        copy = {folder!r} + "/" + name + ".py"
        with open(copy, "w") as file:
            file.write(source)
        return importlib.util.spec_from_file_location(name, copy)

sys.meta_path.insert(0, Changed())
"""


@dataclass(frozen=True)
class Change:
    module: str
    old: str
    new: str
    children_only: bool = False


CHANGES = {
    "a renamed target": Change(GDN_BACKEND, "class GDNAttnBackend(", "class GdnBackend("),
    "a renamed target in the scheduler": Change(GDN_BACKEND, "class GDNAttnBackend(", "class GdnBackend(", True),
    "a plugin that raises": Change(
        "qwen3next_plugin.sglang_integration.gdn_backend", "def make_gdn_backend(", "raise OSError('broken')\ndef make("
    ),
}


@dataclass(frozen=True)
class Ended:
    code: int
    output: str
    left: list[int]

    @property
    def sentences(self) -> list[str]:
        return [line for line in self.output.splitlines() if line.startswith("qwen3next-plugin: ")]


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


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(change: Change, checkpoint: Path, folder: Path) -> Ended:
    folder.mkdir()
    values = {"module": change.module, "old": change.old, "new": change.new, "children_only": change.children_only}
    (folder / "sitecustomize.py").write_text(SITE.format(**values, folder=str(folder)))
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("QWEN3NEXT_", "SGLANG_"))}
    environment |= {"PYTHONPATH": str(folder), "SGLANG_USE_CPU_ENGINE": "1", "HF_HUB_OFFLINE": "1"}
    environment |= {"TRITON_INTERPRET": "0", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "sglang.launch_server", "--model-path", str(checkpoint), "--device", "cpu"]
    command += [
        "--attention-backend",
        "torch_native",
        "--host",
        "127.0.0.1",
        "--port",
        str(free_port()),
        "--skip-server-warmup",
    ]
    command += ["--max-total-tokens", "512", "--max-mamba-cache-size", "16", "--max-running-requests", "2"]
    with (folder / "log").open("w+") as log:
        server = subprocess.Popen(
            command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = server.wait(SECONDS)
        finally:
            server.kill()
        left = processes_of(server.pid)
        for _ in range(20):  # what was told to end may need a moment for it
            if not left:
                break
            time.sleep(0.5)
            left = processes_of(server.pid)
        for process in left:
            os.kill(process, 9)
        log.seek(0)
        return Ended(code, log.read(), left)


@pytest.fixture(scope="module")
def endings(tmp_path_factory: pytest.TempPathFactory) -> dict[str, "Future[Ended]"]:
    """Two at a time, for most of it is imports."""
    folder = tmp_path_factory.mktemp("failing")
    checkpoint = write_random_checkpoint(folder / "tiny", "tiny", dtype="float32")
    with ThreadPoolExecutor(2) as pool:
        return {
            name: pool.submit(launch, change, checkpoint, folder / name.replace(" ", "_"))
            for name, change in CHANGES.items()
        }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("a renamed target", (f"{GDN_BACKEND}.GDNAttnBackend is gone in sglang {sglang.__version__}",)),
        ("a renamed target in the scheduler", (f"{GDN_BACKEND}.GDNAttnBackend is gone",)),
        ("a plugin that raises", ("registering with SGLang failed (OSError: broken)",)),
    ],
)
def test_the_server_ends(endings: dict[str, "Future[Ended]"], name: str, parts: tuple[str, ...]) -> None:
    ended = endings[name].result()
    assert ended.code not in (0, None) and not ended.left, ended.output
    # The detokenizer of 0.5.23 loads plugins too, and says the same as the scheduler.
    (sentence,) = set(ended.sentences)
    assert sentence.endswith("QWEN3NEXT_PLUGIN=0 to run the stock engine.")
    assert all(part in sentence for part in parts), sentence
    if not CHANGES[name].children_only:
        assert "Traceback" not in ended.output.partition("qwen3next-plugin: ")[2], ended.output
