"""A real server as users start it: a process group of its own on a free loopback port, its log in a file.

Start one with `with Server(model, "--flag", ...) as server`. Whatever happens, the whole group is gone afterwards.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any

import httpx
import openai
import psutil
import pytest

from tests.helpers import engine_environment

from .engine import Counts, Engine, Setup

READY_SECONDS = float(os.environ.get("E2E_READY_SECONDS", "600"))
REQUEST_SECONDS = float(os.environ.get("E2E_REQUEST_SECONDS", "600"))
"""Longer ones let tests share a GPU with a benchmark that pauses them while it measures."""
STOP_SECONDS = 20.0
STOCK = {"QWEN3NEXT_PLUGIN": "0"} if os.environ.get("E2E_STOCK") else {}
"""E2E_STOCK=1 runs the tests on the engine as it is, to tell its mistakes from ours; what is ours then fails."""

ACTIVATION = re.compile(r"qwen3next-plugin \S+ (?:is )?active", re.IGNORECASE)
"""The line that says that this plugin's model runs; the stock engine never writes it."""


@lru_cache(maxsize=1)
def engine() -> Engine:
    """The engine that is installed beside these tests."""
    if find_spec("vllm"):
        from .engine_vllm import VllmEngine

        return VllmEngine()
    from .engine_sglang import SglangEngine

    return SglangEngine()


def parameters(setups: Sequence[Setup]) -> list[Any]:
    """Setups as parameters of a fixture, by name and with the marks of the selections they are in."""
    marks = [pytest.mark.quick, pytest.mark.further]
    return [pytest.param(setup, id=str(setup), marks=marks if setup.further else []) for setup in setups]


def flags(
    num_drafts: int = 0,
    cache: bool | str = False,
    max_model_len: int = 512,
    dtype: str = "float32",
    eager: bool = True,
) -> list[str]:
    """Flags of a small server; `cache` is True for the engine's default way to cache prefixes."""
    way = cache if isinstance(cache, str) else engine().cache * cache
    return engine().flags(Setup("", num_drafts, way, max_model_len, dtype, eager))


def environment(**extra: str) -> dict[str, str]:
    """For engine processes of tests: one thread each, offline, settings of nobody else."""
    base = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"} | STOCK
    own = engine().variables()
    inherited = engine_environment()
    for name in [n for n in inherited if n.startswith(("QWEN3NEXT_", *engine().inherited))]:
        del inherited[name]
    places = (extra.pop("PYTHONPATH", ""), own.pop("PYTHONPATH", ""), inherited.get("PYTHONPATH", ""))
    return inherited | base | own | extra | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Exited:
    """How a command ended."""

    code: int
    output: str

    @property
    def plugin_lines(self) -> list[str]:
        """The sentences this plugin printed (its log lines, which carry a level, are not among them)."""
        return [line for line in self.output.splitlines() if line.startswith("qwen3next-plugin: ")]


def run_until_exit(
    model: str | Path, *flags: str, env: Mapping[str, str] | None = None, seconds: float = 120.0
) -> Exited:
    """A server that is expected to refuse: its exit code and everything it wrote. Fails if it is up or hangs."""
    with tempfile.NamedTemporaryFile("w+", suffix=".log") as log:
        process = _spawn(model, flags, free_port(), env or {}, log.fileno())
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(
                f"still running after {seconds:.0f} s, it should have refused to start:\n{_tail(Path(log.name))}"
            ) from None
        finally:
            _end_group(process)
        return Exited(code, Path(log.name).read_text(errors="replace"))


def _spawn(
    model: str | Path, flags: tuple[str, ...], port: int, env: Mapping[str, str], log: int
) -> subprocess.Popen[bytes]:
    command = [*engine().command(str(model), port), *flags]
    return subprocess.Popen(
        command, env=environment(**env), stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def _members(group: int) -> list[psutil.Process]:
    """Processes of a group that are not just waiting to be reaped."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """Asks the group to stop, then makes it."""
    for sig, seconds in ((signal.SIGTERM, STOP_SECONDS), (signal.SIGKILL, STOP_SECONDS)):
        deadline = time.monotonic() + seconds
        try:
            os.killpg(process.pid, sig)
        except ProcessLookupError:
            break
        while time.monotonic() < deadline:
            process.poll()
            if not _members(process.pid):
                break
            time.sleep(0.1)
        else:
            continue
        break
    process.wait(STOP_SECONDS)


def _tail(path: Path, lines: int = 60) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-lines:])


class Server:
    """A running server; `client` talks to it, `log` is all it wrote so far."""

    def __init__(self, model: str | Path, *flags: str, env: Mapping[str, str] | None = None, name: str = "") -> None:
        self.model = str(model)
        self.flags = flags
        self.env = dict(env or {})
        self.name = name or Path(self.model).name
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log_path = Path(tempfile.mkdtemp(prefix="qwen3next-e2e-")) / f"{self.name}.log"
        self.process: subprocess.Popen[bytes] | None = None
        self.started_in = 0.0
        self.counts = Counts()

    def __enter__(self) -> Server:
        begin = time.monotonic()
        with self.log_path.open("wb") as log:
            self.process = _spawn(self.model, self.flags, self.port, self.env, log.fileno())
        try:
            self._wait_until_ready(begin + READY_SECONDS)
        except BaseException:
            self.stop()
            raise
        self.started_in = time.monotonic() - begin
        # A connection for each request: servers close idle ones after seconds, now and then just as one is used again.
        self.client = openai.OpenAI(
            base_url=f"{self.url}/v1",
            api_key="none",
            max_retries=0,
            timeout=REQUEST_SECONDS,
            default_headers={"Connection": "close"},
        )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, deadline: float) -> None:
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"the server ended with {self.process.returncode}:\n{_tail(self.log_path)}")
            try:
                if httpx.get(f"{self.url}/health", timeout=2.0).status_code == 200:
                    return
            except httpx.TransportError:
                pass
            time.sleep(0.25)
        raise AssertionError(f"not ready after {READY_SECONDS:.0f} s:\n{_tail(self.log_path)}")

    def stop(self) -> None:
        """Ends the whole group; safe to call again."""
        if self.process is not None:
            _end_group(self.process)
            self.process = None

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def assert_alive(self) -> None:
        """The server still answers and no engine process died."""
        assert self.process is not None and self.process.poll() is None, _tail(self.log_path)
        assert httpx.get(f"{self.url}/health", timeout=10.0).status_code == 200, _tail(self.log_path)

    def activation_lines(self) -> list[str]:
        return [line for line in self.log.splitlines() if ACTIVATION.search(line)]

    def metric(self, name: str) -> float:
        """Sum of a Prometheus counter or gauge over its labels; 0.0 when the server does not know it yet."""
        text = httpx.get(f"{self.url}/metrics", timeout=30.0).text
        pattern = re.compile(rf"^{re.escape(name)}(?:\{{[^}}]*\}})? (\S+)$", re.MULTILINE)
        return sum(float(value) for value in pattern.findall(text))

    def acceptance(self) -> tuple[float, float]:
        """(draft tokens, accepted ones) since the start."""
        return engine().acceptance(self)

    @property
    def preemptions(self) -> float:
        """How often a running request was thrown out of the cache."""
        return engine().preemptions(self)
