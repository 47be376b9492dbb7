"""One engine process of one side, from its start to its end."""

import asyncio
import json
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qwen3next_plugin.serve.engine_process import cause_of_death
from qwen3next_plugin.serve.processes import running

from .client import BenchError, Client
from .engines import MODEL_NAME


@dataclass
class Server:
    """A server that answers. ``start_seconds``: from its process's start to its first token."""

    client: Client
    record: Path
    log: Path
    process: "subprocess.Popen[bytes]"
    start_seconds: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)


def free_port() -> int:
    """A port of the loopback interface that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def serving(
    command: Sequence[str],
    environment: Mapping[str, str],
    port: int,
    log: Path,
    record: Path,
    *,
    seconds: float,
    tick: Callable[[str], None],
) -> Iterator[Server]:
    """Starts a server and asks it for one token; on leaving, all of its processes are gone.

    ``tick`` is called a few times a second with what it is doing. Raises BenchError with the cause it finds in the log
    if the server ends or is not ready after ``seconds``.
    """
    began = time.perf_counter()
    client = Client(port, MODEL_NAME)
    with running(command, log, env=environment) as process:
        while not asyncio.run(client.ready()):
            waited = time.perf_counter() - began
            tick(f"starting, {waited:.0f} s")
            if process.poll() is not None:
                cause = cause_of_death(log, 0) or "no reason given"
                raise BenchError(f"The server ended with exit code {process.returncode}: {cause} (log: {log})")
            if waited > seconds:
                raise BenchError(f"The server was not ready after {seconds:.0f} s (log: {log})")
            time.sleep(0.2)
        answer = asyncio.run(client.stream([1, 2, 3, 4, 5, 6, 7, 8], 1))
        server = Server(client, record, log, process, answer.chunks[0] - began)
        for file in record.glob("facts-*.json"):
            server.facts |= json.loads(file.read_text(encoding="utf-8"))
        yield server
