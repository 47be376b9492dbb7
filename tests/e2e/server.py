"""A real `vllm serve` as users start it: a process group of its own on a free loopback port, its log in a file.

Start one with `with Server(model, "--flag", ...) as server`. Whatever happens, the whole group is gone afterwards.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import metadata
from pathlib import Path
from types import TracebackType

import httpx
import openai
import psutil

from tests.helpers import engine_environment

READY_SECONDS = float(os.environ.get("E2E_READY_SECONDS", "600"))
STOP_SECONDS = 20.0
VLLM = Path(sys.executable).with_name("vllm")

ACTIVATION = re.compile(r"qwen3next-plugin \S+ (?:is )?active", re.IGNORECASE)
"""The line that says that this plugin's model runs; the stock engine never writes it."""


def flags(
    num_drafts: int = 0, cache: bool = False, max_model_len: int = 512, dtype: str = "float32", eager: bool = True
) -> list[str]:
    """Flags of a small server: blocks of 32 tokens where a state fits in, a cache of 128 MiB, 8 requests at once.

    `eager` leaves torch.compile out, which costs most of a start.
    """
    chosen = ["--dtype", dtype, "--max-model-len", str(max_model_len), "--max-num-seqs", "8", "--block-size", "32"]
    chosen += ["--kv-cache-memory-bytes", str(128 << 20), "--enable-prompt-tokens-details"]
    chosen += ["--enable-prefix-caching", "--mamba-cache-mode", "align"] if cache else ["--no-enable-prefix-caching"]
    if num_drafts:
        chosen += ["--speculative-config", json.dumps({"method": "mtp", "num_speculative_tokens": num_drafts})]
    return chosen + ["--enforce-eager"] * eager


def environment(**extra: str) -> dict[str, str]:
    """For engine processes of tests: two threads at most, offline, caches and settings of nobody else."""
    base = {
        "OMP_NUM_THREADS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CACHE_ROOT": str(Path(tempfile.gettempdir()) / f"qwen3next-e2e-{os.getuid()}"),
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CONFIGURE_LOGGING": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
        "PYTHONUNBUFFERED": "1",
    }
    inherited = engine_environment()
    for name in [n for n in inherited if n.startswith(("QWEN3NEXT_", "VLLM_"))]:
        del inherited[name]
    python_path = [p for p in (extra.pop("PYTHONPATH", ""), _vllm_alias(), inherited.get("PYTHONPATH", "")) if p]
    return inherited | base | extra | {"PYTHONPATH": os.pathsep.join(python_path)}


@lru_cache(maxsize=1)
def _vllm_alias() -> str:
    """A folder with the metadata of a distribution "vllm", or "" where there is one.

    The `vllm` command of vllm-cpu 0.32.0 asks for the version of the distribution "vllm" and ends with
    PackageNotFoundError, because its own is called vllm-cpu.
    """
    try:
        metadata.version("vllm")
        return ""
    except metadata.PackageNotFoundError:
        version = f"{metadata.version('vllm-cpu')}+cpu"  # vLLM looks for "cpu" in it to choose its platform
    folder = Path(tempfile.mkdtemp(prefix="qwen3next-e2e-alias-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    info = folder / f"vllm-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: vllm\nVersion: {version}\n")
    return str(folder)


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
    """`vllm serve` that is expected to refuse: its exit code and everything it wrote. Fails if it is up or hangs."""
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
    command = [str(VLLM), "serve", str(model), "--host", "127.0.0.1", "--port", str(port), *flags]
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
    """A running `vllm serve`; `client` talks to it, `log` is all it wrote so far."""

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
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=300.0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _wait_until_ready(self, deadline: float) -> None:
        assert self.process is not None
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise AssertionError(f"vllm serve ended with {self.process.returncode}:\n{_tail(self.log_path)}")
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
        prefix = "vllm:spec_decode_num"
        return self.metric(f"{prefix}_draft_tokens_total"), self.metric(f"{prefix}_accepted_tokens_total")

    @property
    def preemptions(self) -> float:
        return self.metric("vllm:num_preemptions_total")

    @property
    def block_size(self) -> int:
        """Tokens a cache block, which vLLM may have raised so that a block holds a state."""
        raised = re.findall(r"Setting attention block size to (\d+) tokens", self.log)
        if raised:
            return int(raised[-1])
        given = self.flags.index("--block-size") if "--block-size" in self.flags else None
        return 128 if given is None else int(self.flags[given + 1])
