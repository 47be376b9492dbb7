"""Which engine's functions are measured beside our own kernels: by name, so that no engine is imported from here."""

from __future__ import annotations

import importlib
from importlib import metadata
from importlib.util import find_spec

from qwen3next_plugin.errors import SettingsError

ENGINES = ("vllm", "sglang")
NONE = "none"


def engine_here(asked: str | None) -> str:
    """``asked``, or the engine that is installed, "none" without one.

    Raises SettingsError, one sentence, for another name and for an engine that is not there.
    """
    if asked is None:
        return next((name for name in ENGINES if find_spec(name) is not None), NONE)
    if asked not in (*ENGINES, NONE):
        raise SettingsError(f"--engine: {asked!r} is not known: use {', '.join(ENGINES)} or {NONE}.")
    if asked != NONE and find_spec(asked) is None:
        raise SettingsError(f"--engine: {asked} is not installed here: run it where it is, or with --engine {NONE}.")
    return asked


def offer(engine: str) -> None:
    """Offers what prefill functions the engine brings."""
    if engine == NONE:
        return
    if engine == "sglang":
        importlib.import_module("qwen3next_plugin.bench.kernels.peers.sglang_context").publish()
    importlib.import_module(f"qwen3next_plugin.{engine}_integration.gdn_peers").offer_prefills()


def engine_versions(engine: str) -> dict[str, str]:
    """Of the engine and of FlashInfer, where they are installed: their functions' times depend on them."""
    found = {}
    for name in (engine, "flashinfer-python"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
