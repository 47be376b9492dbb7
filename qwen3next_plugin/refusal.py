"""How this package ends a command: one sentence alone on standard error, and an exit code other than 0."""

import sys
from pathlib import Path
from typing import NoReturn

from .errors import PluginError

EXIT_CODE = 2


def say(error: PluginError) -> None:
    """Print the error's sentence on standard error."""
    print(f"qwen3next-plugin: {error}", file=sys.stderr, flush=True)


def end_with(error: PluginError) -> NoReturn:
    """Say the error's sentence and end the process with `EXIT_CODE`, as no ``except Exception`` can prevent."""
    say(error)
    raise SystemExit(EXIT_CODE) from error


def is_command(name: str) -> bool:
    """Whether this process runs an engine's command ``name``: its console script, or ``python -m`` a module of it."""
    spec = getattr(sys.modules.get("__main__"), "__spec__", None)
    return Path(sys.argv[0]).name == name or (spec is not None and (spec.name or "").startswith(f"{name}."))
