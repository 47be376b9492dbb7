"""What tests of slot-addressed operations share: strided inputs, states in pages, and proof that nothing else moved."""

from collections.abc import Sequence

import torch
from torch import Tensor

from tests.helpers import nan_like

STATE_LAYOUTS = ("contiguous", "pages", "transposed")
Row = tuple[int, int, int]
"""start, end, slot"""


def column_slice(tokens: int, columns: int, dtype: torch.dtype, device: str) -> Tensor:
    """[tokens, columns] standard normal, cut from a wider projection."""
    return torch.randn(tokens, columns + 7, device=device).to(dtype)[:, 3 : 3 + columns]


def poisoned_state(shape: tuple[int, ...], dtype: torch.dtype, device: str, layout: str = "contiguous") -> Tensor:
    """A NaN state [slots, ...]: contiguous, in pages with other data around it, or with its last two dims exchanged."""
    if layout == "transposed":
        return nan_like(*shape[:-2], shape[-1], shape[-2], dtype=dtype, device=device).transpose(-1, -2)
    if layout == "contiguous":
        return nan_like(*shape, dtype=dtype, device=device)
    size = int(torch.tensor(shape[1:]).prod())
    pages = nan_like(shape[0], size + 24, dtype=dtype, device=device)
    return pages[:, 8 : 8 + size].unflatten(1, shape[1:])


def fill_slots(state: Tensor, slots: Sequence[int], scale: float = 1.0) -> None:
    """Put random numbers into these slots; the others stay poisoned."""
    for slot in slots:
        state[slot] = (torch.randn(state.shape[1:], device=state.device) * scale).to(state.dtype)


def bits(x: Tensor) -> Tensor:
    """The bytes of `x`, so that NaN equals NaN."""
    return x.flatten().view(torch.uint8)


def clone_layout(x: Tensor) -> Tensor:
    """A copy with the same strides, over storage of its own."""
    copy = x.untyped_storage().clone()
    return torch.empty(0, dtype=x.dtype, device=x.device).set_(copy, x.storage_offset(), x.shape, x.stride())


def storage_bytes(x: Tensor) -> Tensor:
    """All bytes of the memory that `x` is a view of."""
    return torch.empty(0, dtype=torch.uint8, device=x.device).set_(x.untyped_storage())


def assert_only_these_slots_changed(before: Tensor, after: Tensor, written: Sequence[int]) -> None:
    """Every slot outside `written`, and whatever lies between the slots, has the bits it had."""
    for slot in range(before.shape[0]):
        if slot not in written:
            assert torch.equal(bits(before[slot]), bits(after[slot])), f"slot {slot} was touched"
    between = [clone_layout(state) for state in (before, after)]
    for state in between:
        state.zero_()
    assert torch.equal(*map(storage_bytes, between)), "memory between the slots was touched"


def assert_only_these_tokens_written(out: Tensor, rows: Sequence[Row]) -> None:
    """Tokens outside the rows still hold their poison; those inside hold none."""
    written = torch.zeros(out.shape[0], dtype=torch.bool)
    for start, end, slot in rows:
        if slot >= 0:
            written[start:end] = True
    poisoned = torch.isnan(out.flatten(1)).cpu()
    assert bool(poisoned[~written].all()), "a token outside every row was written"
    assert not bool(poisoned[written].any()), "a token was left out"


def ints(values: Sequence[int], device: str, dtype: torch.dtype = torch.int32) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device=device)


def ranges(rows: Sequence[Row], device: str) -> dict[str, Tensor]:
    """query_start and query_end of the rows, as the operations take them."""
    return {
        "query_start": ints([row[0] for row in rows], device),
        "query_end": ints([row[1] for row in rows], device),
    }


def strided_slots(values: Sequence[int], device: str) -> Tensor:
    """Slots as the middle column of a block table."""
    return torch.stack([ints([99] * len(values), device), ints(values, device), ints([98] * len(values), device)], 1)[
        :, 1
    ]
