"""What Triton compiles of this package's kernels in this process, and a word where that happens while users wait.

Triton calls one hook after each compilation, of whoever's kernel (`triton.knobs.runtime.jit_post_compile_hook`, Triton
3.4 and later). It is called for kernels that come from Triton's cache on disk too: these take milliseconds, but are
just as little foreseen.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

PACKAGE = __package__


@dataclass(frozen=True)
class Compilation:
    """A kernel of this package and what it was compiled for.

    specialization: ``name=value`` of what is constant, ``name:type`` of other arguments, with ``%16`` where a number or
    an address is known to be divisible by 16; then the launch's options.
    """

    kernel: str
    specialization: str


_seen: dict[Compilation, None] = {}  # in order
_while_serving: list[Compilation] = []
_warn: Callable[[str], None] | None = None


def observe() -> None:
    """Note compilations from now on, in this process. Whatever hook is there already is called too. Safe to repeat."""
    import triton

    runtime: Any = triton.knobs.runtime
    before = runtime.jit_post_compile_hook
    if getattr(before, "notes_qwen3next", False):
        return
    _spare_others_constants()

    def note(**event: Any) -> Any:
        _note(event)
        return None if before is None else before(**event)

    note.notes_qwen3next = True  # type: ignore[attr-defined]
    runtime.jit_post_compile_hook = note


def compiled() -> tuple[Compilation, ...]:
    """All that were noted, in their order, each once."""
    return tuple(_seen)


def compiled_while_serving() -> tuple[Compilation, ...]:
    """Those that were warned of."""
    return tuple(_while_serving)


def serve(warn: Callable[[str], None] | None) -> None:
    """From now on a compilation is a fault, told to `warn` in one line; None: it is not (any more)."""
    global _warn
    observe()  # another's hook may have taken our place
    _warn = warn


@contextmanager
def expected() -> Iterator[None]:
    """Compilations inside are no fault."""
    global _warn
    before, _warn = _warn, None
    try:
        yield
    finally:
        _warn = before


def _note(event: dict[str, Any]) -> None:
    kernel = event.get("fn")
    if not str(getattr(kernel, "module", "")).startswith(f"{PACKAGE}."):
        return
    try:
        specialization = _specialization(event["compile"])
    except (AttributeError, LookupError, TypeError, ValueError):  # another Triton's form of it must not end a server
        specialization = f"{event.get('repr')} {event.get('key')}"
    found = Compilation(str(getattr(kernel, "name", "?")), specialization)
    if found in _seen:
        return
    _seen[found] = None
    if _warn is not None:
        _while_serving.append(found)
        _warn(
            f"Triton compiled {found.kernel} while serving, and requests waited for it: {found.specialization}. "
            "It should have been compiled before the server was ready: please report it with this line."
        )


def _specialization(compilation: dict[str, Any]) -> str:
    signature = compilation["signature"]
    names = list(signature)
    constants = {names[path[0]]: value for path, value in compilation["constants"].items()}
    (attributes,) = compilation["configs"]
    known = {names[path[0]] for path, found in attributes.items() if ["tt.divisibility", 16] in found}
    said = (
        f"{name}={constants[name]}" if name in constants else f"{name}:{kind}{'%16' * (name in known)}"
        for name, kind in signature.items()
    )
    options = (f"{name}={compilation.get(name)}" for name in ("num_warps", "num_stages"))
    return " ".join([*said, *options])


def _spare_others_constants() -> None:
    """Where a hook is set, Triton writes each compiled kernel's constants as JSON, and fails on those that JSON lacks.

    That would end a server because of somebody else's kernel; nobody here reads that text.
    """
    from triton.runtime import jit

    write = getattr(jit, "serialize_specialization_data", None)
    if write is None or getattr(write, "spares_constants", False):
        return

    @functools.wraps(write)
    def written(*args: Any, **kwargs: Any) -> str | None:
        try:
            text: str = write(*args, **kwargs)
        except (AttributeError, TypeError, ValueError):
            return None
        return text

    written.spares_constants = True  # type: ignore[attr-defined]
    jit.serialize_specialization_data = written
