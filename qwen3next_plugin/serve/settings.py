"""What the user asked of `make serve`, read from variables (make passes MODEL=… and the like on to its commands)."""

import os
import shlex
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from . import pins
from .errors import ServeError

NAMES = (
    *("MODEL", "PORT", "ARGS", "ONCE", "ENGINE", "QUESTION", "TIMEOUT"),
    *("TORCH_CPU_INDEX", "DEVICE", "PYTHON", "VENV", "USE_ENV"),
)
"""Every variable that `make serve` knows; none is passed on to the engine."""

DEFAULT_PORT = 8000


@dataclass(frozen=True)
class Settings:
    """One `make serve`. `model` is None for the demo checkpoint; `port` is free at the time of asking."""

    engine: pins.Engine
    model: str | None
    port: int
    host: str
    engine_arguments: tuple[str, ...]
    once: bool
    question: str | None
    timeout: float
    api_key: str | None

    @classmethod
    def read(cls, environ: Mapping[str, str] = os.environ) -> "Settings":
        """Check every variable. Raises ServeError, one sentence naming the variable."""
        arguments = _arguments(environ.get("ARGS", ""))
        return cls(
            engine=read_engine(environ),
            model=_model(environ.get("MODEL", "")),
            port=_port(environ.get("PORT", "")),
            host=_reachable(option(arguments, "--host")),
            engine_arguments=arguments,
            once=_yes(environ, "ONCE"),
            question=environ.get("QUESTION") or None,
            timeout=_seconds(environ.get("TIMEOUT", "")),
            api_key=option(arguments, "--api-key") or environ.get("VLLM_API_KEY") or None,
        )


def read_engine(environ: Mapping[str, str] = os.environ) -> pins.Engine:
    """The engine that ENGINE= names; vLLM if it is unset."""
    name = environ.get("ENGINE") or "vllm"
    if name not in pins.ENGINES:
        raise ServeError(f"ENGINE={name} is not known; there is ENGINE={', ENGINE='.join(pins.ENGINES)}.")
    return pins.ENGINES[name]


def _arguments(text: str) -> tuple[str, ...]:
    try:
        arguments = tuple(shlex.split(text))
    except ValueError as problem:
        raise ServeError(f"ARGS={text} cannot be split into arguments: {str(problem).lower()}.") from None
    if any(part.split("=")[0] == "--port" for part in arguments):
        raise ServeError("ARGS must not hold --port; say PORT=… instead.")
    return arguments


def option(arguments: tuple[str, ...], name: str) -> str | None:
    """The value of `--name value` or `--name=value`, the last one if there are several."""
    value = None
    for place, part in enumerate(arguments):
        if part == name and place + 1 < len(arguments):
            value = arguments[place + 1]
        elif part.startswith(f"{name}="):
            value = part.split("=", 1)[1]
    return value


def _model(text: str) -> str | None:
    """A checkpoint folder as an absolute path, or a hub name as it stands."""
    if not text:
        return None
    folder = Path(text).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ServeError(f"MODEL={text} is a folder without config.json; name the folder that holds it.")
        return str(folder.resolve())
    if text.startswith((".", "/", "~")) or text.count("/") > 1:
        raise ServeError(f"MODEL={text} is not there; give a checkpoint folder or a hub name such as Qwen/Name.")
    return text


def _port(text: str) -> int:
    """PORT if it is free; without one 8000, or any free port where that is taken."""
    if text:
        if not text.isdecimal() or not 0 < int(text) < 65536:
            raise ServeError(f"PORT={text} is not a port; give a number from 1 to 65535.")
        if not _is_free(int(text)):
            raise ServeError(f"PORT={text} is in use; name another one.")
        return int(text)
    if _is_free(DEFAULT_PORT):
        return DEFAULT_PORT
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    print(f"Port {DEFAULT_PORT} is in use; taking {port}.", flush=True)
    return port


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _reachable(host: str | None) -> str:
    """Where this machine reaches a server bound to `host`."""
    return "127.0.0.1" if host in (None, "0.0.0.0", "::", "localhost") else str(host)


def _yes(environ: Mapping[str, str], name: str) -> bool:
    value = environ.get(name, "")
    if value not in ("", "0", "1"):
        raise ServeError(f"{name}={value} means nothing here; say {name}=1 or leave it out.")
    return value == "1"


def _seconds(text: str) -> float:
    try:
        seconds = float(text or 3600)
    except ValueError:
        seconds = -1.0
    if not seconds > 0:
        raise ServeError(f"TIMEOUT={text} is not a number of seconds above zero.")
    return seconds
