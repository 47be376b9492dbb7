"""Which implementation of an operation runs, and how operations are made known to torch.

Every operation has a reference in plain torch and a Triton version. `choose` picks one by the tensor's device,
`declare` and `describe` let an engine log what it will run, and `custom_op` registers an operation in the `qwen3next::`
namespace, so that compiled graphs see it as one opaque node with a fake implementation.
"""

import functools
import importlib
import os
import pkgutil
from collections.abc import Callable, Sequence
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

REFERENCE = "reference"
TRITON = "triton"

Implementation = str | Callable[[], str]

_LIBRARY = torch.library.Library("qwen3next", "FRAGMENT")  # kept alive: its registrations go when it goes
_DECLARED: dict[str, dict[str, Implementation]] = {}
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


def declare(op: str, *, cuda: Implementation = TRITON, cpu: Implementation = REFERENCE) -> None:
    """Say what `op` runs automatically on each device type: a short text, or a function giving it when it is asked for.

    Called by each operation's package when it is imported; declaring an operation again replaces what was said.
    """
    _DECLARED[op] = {"cuda": cuda, "cpu": cpu}


def describe(device_type: str) -> dict[str, str]:
    """Operation name -> the implementation and config that runs on `device_type` ("cuda" or "cpu"), sorted by name.

    Imports every operation's package, so that all of them have declared. Raises ValueError for another device type.
    """
    if device_type not in ("cuda", "cpu"):
        raise ValueError(f"device_type is {device_type!r}; it must be 'cuda' or 'cpu'")
    package = importlib.import_module(__package__)
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            importlib.import_module(f"{__package__}.{module.name}")
    if _preferred == REFERENCE:
        return dict.fromkeys(sorted(_DECLARED), REFERENCE)
    column = "cuda" if _preferred == TRITON else device_type
    texts = ((op, by_device[column]) for op, by_device in sorted(_DECLARED.items()))
    return {op: text() if callable(text) else text for op, text in texts}


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
