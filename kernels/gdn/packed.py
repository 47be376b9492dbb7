"""Rows of a prefill as the engines' own functions want them: one behind the other, lengths known on the host."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

import torch
from torch import Tensor

from .reference import SNAPSHOT_GRID

CHUNK = 64
"""Tokens a chunk of the engines' functions, all of them."""


@dataclass(frozen=True)
class PackedRows:
    """What the host knows of a prefill's rows, said once a step.

    first: the first row's first token in the flat batch; lengths: tokens of each row; cu_seqlens: int64 [N + 1] on the
    device, where each row starts counted from ``first``, and where the last ends; snapshot_grid: a snapshot is asked
    for after a multiple of so many tokens of a row or after its last, itself a multiple of ``SNAPSHOT_GRID``.
    """

    first: int
    lengths: tuple[int, ...]
    cu_seqlens: Tensor
    snapshot_grid: int = SNAPSHOT_GRID

    @classmethod
    def of(
        cls, lengths: Sequence[int], device: torch.device | str, first: int = 0, snapshot_grid: int = SNAPSHOT_GRID
    ) -> PackedRows:
        """Rows of these lengths from token ``first`` on. The host waits for nothing."""
        return cls(first, tuple(lengths), _on_device([0, *accumulate(lengths)], device), snapshot_grid)

    @cached_property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return sum(self.lengths)

    @cached_property
    def chunk_indices(self) -> Tensor:
        """int64 [chunks, 2]: the row and the place in it of each chunk of 64 tokens."""
        table = [(row, chunk) for row, count in enumerate(self._counts(CHUNK)) for chunk in range(count)]
        return _on_device(table, self.cu_seqlens.device)

    @cached_property
    def chunk_offsets(self) -> Tensor:
        """int64 [N + 1]: how many chunks lie before each row."""
        return _on_device([0, *accumulate(self._counts(CHUNK))], self.cu_seqlens.device)

    @cached_property
    def checkpoints(self) -> int:
        """How many whole stretches of ``snapshot_grid`` tokens the rows have."""
        return sum(length // self.snapshot_grid for length in self.lengths)

    @cached_property
    def checkpoint_offsets(self) -> Tensor:
        """int64 [N + 1]: how many such stretches lie before each row."""
        counts = (length // self.snapshot_grid for length in self.lengths)
        return _on_device([0, *accumulate(counts)], self.cu_seqlens.device)

    def _counts(self, size: int) -> list[int]:
        return [-(-length // size) for length in self.lengths]


def _on_device(values: Sequence[int] | Sequence[tuple[int, int]], device: torch.device | str) -> Tensor:
    """int64 values on the device; from pinned memory to a GPU, so that the host does not wait for the copy."""
    tensor = torch.tensor(values, dtype=torch.int64, device="cpu")  # whatever the default device is
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
