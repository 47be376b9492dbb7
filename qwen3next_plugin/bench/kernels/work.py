"""What a case consists of once its inputs are on a GPU: calls to time, and what their output has to be."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .cases import Case

Call = Callable[[], Tensor]
Engine = Literal["vllm", "sglang"]
Products = Literal["bf16", "fp8"]

L2_TIMES = 4  # how often the L2 cache is filled before inputs come round again
MOST_COPIES = 128
_CPU_COPIES = 2


@dataclass
class Prepared:
    """Calls of one implementation, one a copy of the inputs.

    does: which of the work's expected outputs they give; facts: what else the row should say of them.
    """

    calls: Sequence[Call]
    does: str = ""
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass
class Work:
    """A case with several copies of its inputs, which calls take in turn so that each finds its inputs in memory.

    text: what is done, in words; bytes, flops, products: the least that has to be moved and computed, and in which
    type; inputs, about: what adapters of other implementations need; own: this project's, "own" and, where the model
    runs something else inside this engine, "plugin" (`bounds.OWN` has names of variants); engine_runs: the model runs
    the engine's own here;
    share_of: which of `own` the bytes and products are of; expected: the
    outputs of the first copy in float64 (float32 where that is too large), by what is done; subset: the part of an
    output that is compared; restore: puts the first copy's inputs back.
    """

    case: Case
    text: str
    bytes: int
    flops: int
    products: Products
    inputs: list[Any]
    own: dict[str, Prepared]
    expected: dict[str, Callable[[], Tensor]]
    subset: Callable[[Tensor], Tensor]
    restore: Callable[[], None] = lambda: None
    about: Any = None
    engine_runs: bool = False
    share_of: str = "own"
    facts: dict[str, Any] = field(default_factory=dict)

    def error(self, prepared: Prepared) -> float:
        """Relative error, in the 2-norm, of the first call's output; infinite if it is not finite."""
        self.restore()
        actual = self.subset(prepared.calls[0]()).double()
        expected = self.expected[prepared.does]().double().reshape(actual.shape)
        if not bool(torch.isfinite(actual).all()):
            return math.inf
        return float((actual - expected).norm() / expected.norm().clamp_min(1e-30))


_rehearsing = ContextVar("rehearsing", default=False)


@contextmanager
def rehearsing() -> Iterator[None]:
    """Inputs are made once inside: for what is run to be compiled, beside other processes."""
    token = _rehearsing.set(True)
    try:
        yield
    finally:
        _rehearsing.reset(token)


def is_rehearsal() -> bool:
    """Whether it is so here."""
    return _rehearsing.get()


def copies_of(moved: int, held: int, device: torch.device) -> int:
    """How many copies of inputs to make when a call moves and holds so many bytes."""
    if is_rehearsal():
        return 1
    if device.type != "cuda":
        return _CPU_COPIES
    properties: Any = torch.cuda.get_device_properties(device)
    free, _ = torch.cuda.mem_get_info(device)
    wanted = math.ceil(L2_TIMES * properties.L2_cache_size / moved)
    return max(1, min(MOST_COPIES, wanted, int(0.4 * free / held)))


class Normal:
    """Normal values from a generator of its own: equal calls in equal order give equal tensors."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        """Values of this shape, standard deviation ``scale``."""
        return torch.empty(shape, dtype=dtype, device=self.device).normal_(0.0, scale, generator=self._generator)

    def order(self, count: int) -> Tensor:
        """The numbers below ``count`` in any order."""
        return torch.randperm(count, device=self.device, generator=self._generator)
