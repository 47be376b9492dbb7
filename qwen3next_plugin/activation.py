"""The one log line that says the plugin is active in an engine process, and with what."""

from collections.abc import Mapping
from importlib import metadata

DISTRIBUTION = "qwen3next-plugin"


def plugin_version() -> str:
    """The installed version of this package; "unknown" when run from a tree that nobody installed."""
    return _version(DISTRIBUTION) or "unknown"


def activation_line(engine: str, engine_version: str, device_name: str, choices: Mapping[str, str]) -> str:
    """One line: plugin, engine, torch and Triton versions, the device, and each operation's implementation and config.

    ``choices`` is what `kernels.dispatch.describe` returns: operation to a short text. Line breaks inside any argument
    become spaces, for log readers count on one line.
    """
    versions = [
        f"{engine} {engine_version}",
        *(f"{package} {_version(package) or 'absent'}" for package in ("torch", "triton")),
    ]
    chosen = ", ".join(f"{operation}={choice}" for operation, choice in choices.items()) or "none"
    line = f"{DISTRIBUTION} {plugin_version()} active: {', '.join(versions)}; device {device_name}; kernels: {chosen}"
    return " ".join(line.split())


def state_type_advice(stored: str, flag: str) -> str | None:
    """What to tell a user whose recurrent states are ``stored`` as bfloat16, or None for any other type.

    ``flag`` is the engine's for that type. Why: benchmarks/NOTES.md, "Which type a recurrent state may be stored in".
    """
    if stored != "bfloat16":
        return None
    return (
        "Recurrent states are stored as bfloat16, in which heads with a long memory go wrong by several percent; "
        f"{flag} float16 takes the same memory and rounds eight times finer, {flag} float32 takes twice as much."
    )


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
