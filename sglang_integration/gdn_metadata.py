"""What the Gated DeltaNet layers must know of a step, built once a step from SGLang's forward batch.

SGLang gives every request one slot of its state pool. Prefill and decode advance the state in that slot. A verify step
leaves it alone and records what its tokens do to it, row n of the batch in row n of the records; when SGLang knows how
many drafts were right, it has the accepted tokens committed. With the radix strategies
`extra_buffer` and `extra_buffer_lazy` a step also keeps snapshots for the radix tree: a prefill where a chunk ends, a
decode after its token, in a slot that the scheduler chose (`mamba_track_*`).

Nothing here looks at a value on the GPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from qwen3next_plugin.kernels.gdn import SNAPSHOT_GRID, PackedRows
from qwen3next_plugin.kernels.gdn.step import DraftRows, PrefillRows, RecurrentRows

PADDING = -1
"""The slot of rows that only fill up a batch: nothing is read or written."""


@dataclass(frozen=True)
class Qwen3NextGdnMetadata:
    """The rows of one step; a row set is None when no request of the step needs it.

    mamba_cache_indices [rows]: every row's slot, `PADDING` for padding, under the name that SGLang has for it.
    """

    mamba_cache_indices: torch.Tensor
    prefill: PrefillRows | None = None
    recurrent: RecurrentRows | None = None
    drafts: DraftRows | None = None


def masked_slots(slots: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`slots` where `mask`, `PADDING` elsewhere. Also recorded into graphs: nothing here is copied from the host."""
    return slots.masked_fill(~mask, PADDING)


def prefill_rows(
    batch: Any,
    slots: torch.Tensor,
    snapshot_slots: torch.Tensor | None,
    snapshot_grid: int = SNAPSHOT_GRID,
) -> PrefillRows:
    """Rows of a step that continues prompts: SGLang's EXTEND, or MIXED, whose decode rows are extensions by one token.

    batch: SGLang's ForwardBatch; snapshot_slots [rows], `PADDING` where the radix tree wants nothing, or None;
    snapshot_grid: where it can want something, in tokens of a row.
    """
    lengths = batch.extend_seq_lens_cpu
    packed = None
    # Rows lie one behind the other from token 0 on. Rows that only fill up a batch may have lengths and no tokens.
    if lengths and len(lengths) == slots.shape[0] and sum(lengths) <= batch.input_ids.shape[0]:
        packed = PackedRows.of(lengths, slots.device, snapshot_grid=snapshot_grid)
    positions = batch.mamba_track_aligned_lens() if snapshot_slots is not None else None
    # Captured prefills are tried with int64 buffers and run with int32 ones: kernels are compiled for one of them.
    start = batch.extend_start_loc.to(torch.int32)
    return PrefillRows(
        query_start=start,
        query_end=start + batch.extend_seq_lens.to(torch.int32),
        state_slots=slots,
        has_initial_state=batch.extend_prefix_lens > 0,
        max_query_len=max(lengths or (batch.input_ids.shape[0],)),
        snapshot_positions=positions,
        snapshot_slots=snapshot_slots if positions is not None else None,
        packed=packed,
    )


def decode_rows(
    query_start_loc: torch.Tensor, slots: torch.Tensor, snapshot_slots: torch.Tensor | None
) -> RecurrentRows:
    """Rows of a step that decodes one token a request; query_start_loc [rows + 1]."""
    return RecurrentRows(
        query_start=query_start_loc[:-1],
        query_end=query_start_loc[1:],
        conv_slots=slots,
        initial_slots=slots,
        output_slots=slots.unsqueeze(1),
        num_accepted_tokens=None,
        max_query_len=1,
        snapshot_slots=snapshot_slots,
    )


def draft_rows(query_start_loc: torch.Tensor, slots: torch.Tensor, max_query_len: int) -> DraftRows:
    """Rows of a step that verifies drafts; query_start_loc [rows + 1]; a row has at most max_query_len tokens."""
    return DraftRows(query_start_loc[:-1], query_start_loc[1:], slots, max_query_len)
