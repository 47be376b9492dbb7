"""Which implementation of an operation runs, and how operations are made known to torch.

Every operation has a reference in plain torch and a Triton version. `choose` picks one by the tensor's device,
`declare` says what that is for which shapes, `table` and `describe` tell it to a user and to an engine's log, and
`custom_op` registers an operation in the `qwen3next::` namespace, so that compiled graphs see it as one opaque node
with a fake implementation.
"""

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

import torch

from .gpus import NO_GPU, Target

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"
TRITON = "triton"


@dataclass(frozen=True)
class Choice:
    """What `runs` for some shapes or formats of an operation, and why; `tiles` says where tile sizes come from.

    details: what of it a file decides, each with its reason; too long for an engine's log.
    """

    shapes: str = "all"
    runs: str = TRITON
    why: str = ""
    tiles: str = ""
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """A line of the table: a choice for one operation. `own` is false for what is left to the engine."""

    operation: str
    choice: Choice
    own: bool = True


Choices = Sequence[Choice] | Callable[[Target], Sequence[Choice]]

_LIBRARY = torch.library.Library("qwen3next", "FRAGMENT")  # kept alive: its registrations go when it goes
_DECLARED: dict[str, tuple[Choices, bool]] = {}
_preferred: str | None = None


def interpreting() -> bool:
    """Whether Triton kernels run in Triton's interpreter (TRITON_INTERPRET=1), that is, on CPU tensors too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def prefer(backend: str | None) -> None:
    """Make `backend` ("reference" or "triton") what None means in this process; None goes back to automatic.

    For a user's switch, read once at start. Raises ValueError for another name.
    """
    global _preferred
    if backend not in (None, REFERENCE, TRITON):
        raise ValueError(f"backend is {backend!r}; it must be None, {REFERENCE!r} or {TRITON!r}")
    _preferred = backend


def choose(tensor: torch.Tensor, backend: str | None) -> str:
    """The implementation that runs for `tensor`: "reference" or "triton".

    `backend` None means what `prefer` was told, else Triton on CUDA tensors and the reference elsewhere; a name is
    taken at its word. Raises ValueError for an unknown name, and for "triton" on a CPU tensor outside Triton's
    interpreter.
    """
    backend = backend or _preferred
    if backend is None:
        return TRITON if tensor.is_cuda else REFERENCE
    if backend == TRITON and not tensor.is_cuda and not interpreting():
        raise ValueError(
            f"backend='triton' was asked for a tensor on {tensor.device}: give CUDA tensors, or set TRITON_INTERPRET=1 "
            "before triton is imported"
        )
    if backend not in (REFERENCE, TRITON):
        raise ValueError(f"backend is {backend!r}; it must be None, {REFERENCE!r} or {TRITON!r}")
    return backend


def declare(op: str, *, cuda: Choices = (Choice(),), own: bool = True) -> None:
    """Say what `op` runs automatically on a GPU, or give a function that says it of a GPU; on a CPU the reference runs.

    Called by each operation's package when it is imported; declaring an operation again replaces what was said. Not
    `own` is what the engine runs: it stands in the table, so that the table is whole, and not in an engine's log.
    """
    _DECLARED[op] = (cuda, own)


def present() -> Target | None:
    """The GPU of this process, or None."""
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.current_device()
    return Target(torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device))


def table(target: Target | None) -> list[Row]:
    """What runs on that GPU, None: on a CPU, and under the preference that `prefer` was told; sorted by operation.

    Imports every operation's package, so that all of them have declared.
    """
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg or module.name == "lent":
            importlib.import_module(f"{__package__}.{module.name}")
    reference = _preferred == REFERENCE or (target is None and _preferred is None)
    why = "plain torch, as was asked for" if _preferred == REFERENCE else "plain torch on a CPU"
    rows: list[Row] = []
    for op, (choices, own) in sorted(_DECLARED.items()):
        if own and reference:
            choices = (Choice(runs=REFERENCE, why=why),)
        elif callable(choices):
            choices = choices(target or NO_GPU)
        rows += [Row(op, choice, own) for choice in choices]
    return rows


def describe(device_type: str) -> dict[str, str]:
    """Own operation -> in a few words what runs on `device_type` ("cuda": the present GPU, or "cpu"), sorted by name.

    Raises ValueError for another device type.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device_type is {device_type!r}; it must be 'cuda' or 'cpu'")
    chosen: dict[str, list[Choice]] = {}
    for row in table((present() or NO_GPU) if device_type == "cuda" else None):
        if row.own:
            chosen.setdefault(row.operation, []).append(row.choice)
    return {op: _text(choices) for op, choices in chosen.items()}


def _text(choices: Sequence[Choice]) -> str:
    runs = " and ".join(dict.fromkeys(choice.runs for choice in choices))
    if runs == REFERENCE:
        return runs
    said = [
        f"{choice.runs + ' ' if choice.runs != choices[0].runs else ''}{choice.shapes}: {choice.why}"
        for choice in choices
        if choice.why
    ]
    said += dict.fromkeys(f"tiles: {choice.tiles}" for choice in choices if choice.tiles)
    return f"{runs} ({'; '.join(said)})" if said else runs


def custom_op(*, fake: Callable[P, R], mutates_args: Sequence[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Decorator: register a function as `qwen3next::<its name>`, with `fake` for tracing, and call it through torch.

    The schema comes from the annotations. A plain library definition is used rather than `torch.library.custom_op`,
    whose Python autograd wrapper costs several microseconds a call: these operations serve, they do not train.
    """

    def register(implementation: Callable[P, R]) -> Callable[P, R]:
        name = implementation.__name__
        schema = torch.library.infer_schema(implementation, mutates_args=tuple(mutates_args))
        _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        for key in ("CPU", "CUDA"):
            _LIBRARY.impl(name, implementation, key)
        torch.library.register_fake(f"qwen3next::{name}", fake, lib=_LIBRARY)
        overload = getattr(torch.ops.qwen3next, name).default

        @functools.wraps(implementation)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return overload(*args, **kwargs)

        return call

    return register
