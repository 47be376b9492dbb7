"""Rows of requests that are skipped (slot -1), in the forms in which engines give rows to `gdn_step`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from .kernels.gdn.step import DraftRows, PrefillRows, RecurrentRows

SKIPPED = -1

StepRows = dict[str, Any]
"""The row sets of one `gdn_step`, by its argument's names."""


def tokens_a_row(rows: StepRows) -> int:
    """Tokens of a row of drafts, at most; 1 in a step without."""
    if "drafts" in rows:
        return int(rows["drafts"][0].max_query_len)
    return int(rows["recurrent"].max_query_len) if "recurrent" in rows else 1


@dataclass(frozen=True)
class SkippedRows:
    """``count`` rows without tokens; indices and slots of the given types, those of snapshots being another."""

    device: torch.device
    count: int = 2
    snapshot_dtype: torch.dtype = torch.int64

    def slots(self, *columns: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        """[count, *columns], all of them -1: no slot, or no token."""
        return torch.full((self.count, *columns), SKIPPED, dtype=dtype, device=self.device)

    def starts(self) -> torch.Tensor:
        """[count + 1] int32: where rows start and the last one ends."""
        return torch.zeros(self.count + 1, dtype=torch.int32, device=self.device)

    def prefill(self, snapshots: bool = False) -> PrefillRows:
        """Rows of prompts, of which states are kept besides or not."""
        starts = self.starts()
        kept = self.slots(dtype=self.snapshot_dtype) if snapshots else None
        has_state = torch.zeros(self.count, dtype=torch.bool, device=self.device)
        return PrefillRows(starts[:-1], starts[1:], self.slots(), has_state, 1, kept, kept)

    def decode(self, snapshots: bool = False) -> RecurrentRows:
        """Rows of one token each."""
        starts, slots = self.starts(), self.slots()
        kept = self.slots(dtype=self.snapshot_dtype) if snapshots else None
        return RecurrentRows(starts[:-1], starts[1:], slots, slots, slots.unsqueeze(1), None, 1, kept)

    def verify(self, tokens: int) -> RecurrentRows:
        """Rows of up to ``tokens`` tokens, each with a slot for the state after it."""
        starts, slots = self.starts(), self.slots()
        accepted = torch.ones_like(slots)
        return RecurrentRows(starts[:-1], starts[1:], slots, slots, self.slots(tokens), accepted, tokens)

    def drafts(self, tokens: int) -> DraftRows:
        """Rows of up to ``tokens`` tokens that leave records."""
        starts = self.starts()
        return DraftRows(starts[:-1], starts[1:], self.slots(), tokens)
