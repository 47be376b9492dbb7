"""An engine on its way up: is it alive, is it ready, what is it doing."""

import re
import subprocess
import time
from pathlib import Path

from .api import Api
from .errors import ServeError
from .pins import STAND_INS
from .progress import Progress

ACTIVATION = "qwen3next-plugin"
"""The plugin's one log line an engine process begins with this name."""

REFUSALS = ("qwen3next-plugin: ", f"{STAND_INS}: ")
"""What the sentence begins with when the plugin, or the test aid beside it, stops an engine."""

_EXCEPTION = re.compile(r"(?<![\w.])[\w.]*(?:Error|Exception|Interrupt): .+|(?<=: error: ).+")  # or a wrong flag

_WARNING = re.compile(r"\bWARNING\b")

# What a line of an engine's log says about where its start has got to; the last one that matched is shown.
_PHASES = [
    (re.compile(pattern), phase)
    for pattern, phase in (
        (r"Resolved architecture|Initializing an? .*engine", "reading the model's configuration"),
        (r"server_args=", "starting its processes"),
        (r"Starting to load model|Loading (safetensors|weights)|Load weight begin", "loading weights"),
        (r"Loading weights took|Model loading took|Load weight end", "weights are loaded"),
        (r"torch\.compile|Dynamo|Compiling a graph|Warming up", "compiling"),
        (r"KV cache size|KV Cache is allocated|Captur(e|ing) .*graphs?|init engine", "sizing the cache and warming up"),
        (r"Starting vLLM|Started server process|Waiting for application", "opening the API"),
    )
]


def phase_of(line: str) -> str | None:
    """What a line of the engine's log says about its start, or None."""
    for pattern, phase in _PHASES:
        if pattern.search(line):
            return phase
    return None


def cause_of_death(log: Path, start: int) -> str:
    """The most telling line of a failed start: a refusal of the plugin, else the first exception; "" if there is none.

    Engines pass an exception on through several processes; the first one logged is where it began. Warnings may speak
    of exceptions that nobody had.
    """
    first = ""
    with log.open(errors="replace") as output:
        output.seek(start)
        for line in output:
            for refusal in REFUSALS:
                if line.startswith(refusal):
                    return line.removeprefix(refusal).strip()
            if not first and not _WARNING.search(line) and (found := _EXCEPTION.search(line)):
                first = found.group().strip()
    return first


def wait_until_ready(process: "subprocess.Popen[bytes]", log: Path, start: int, api: Api, timeout: float) -> float:
    """Follow the log from byte `start` until /health answers; returns the seconds it took.

    Raises ServeError if the engine ends first or `timeout` seconds pass.
    """
    phase = "starting Python"
    with Progress("Starting the engine") as step, log.open(errors="replace") as output:
        output.seek(start)
        while not api.is_ready():
            for line in output:
                phase = phase_of(line) or phase
            step.update(phase)
            if process.poll() is not None:
                cause = cause_of_death(log, start) or "no reason given."
                raise ServeError(
                    f"The engine ended with exit code {process.returncode} before it was ready: {cause}", log
                )
            if step.seconds > timeout:
                raise ServeError(f"The engine was not ready after {timeout:.0f} s (TIMEOUT=… changes that).", log)
            time.sleep(0.2)
        return step.seconds


def activation_line(log: Path, start: int) -> str | None:
    """The plugin's own line in this start's part of the log, without the logger's prefix."""
    with log.open(errors="replace") as output:
        output.seek(start)
        for line in output:
            place = line.find(f"{ACTIVATION} ")
            if place >= 0 and "active" in line:
                return line[place:].strip()
    return None
