"""The short causal convolution over slot-addressed state: prefill of whole ranges, update by a few tokens.

Rows are token ranges ``[query_start[n], query_end[n])`` of a flat batch, disjoint and in any order. Empty rows and rows
with a negative slot are skipped: nothing of theirs is read or written. Tokens in no range keep what ``out`` held.
"""

from types import ModuleType

from torch import Tensor

from ..checks import check_optional
from ..dispatch import TRITON, choose, declare
from . import reference
from .validation import check_conv, check_prefill_rows, check_update_rows

__all__ = ["causal_conv1d_prefill", "causal_conv1d_update"]

declare("causal_conv1d_prefill")
declare("causal_conv1d_update")


def _implementation(chosen: str) -> ModuleType:
    """The module of the backend that was chosen; Triton is not imported where the reference runs."""
    if chosen == TRITON:
        from . import triton

        return triton
    return reference


def causal_conv1d_prefill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot_positions: Tensor | None = None,
    snapshot_slots: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> None:
    """Convolve every row and leave its last W - 1 inputs in its slot; fills ``out`` and ``conv_state`` in place.

    The formula is :func:`.reference.causal_conv`'s (Gated Delta Networks, arXiv 2412.06464, section 3.4), in float32.

    Args:
        x: ``[T, D]`` float32, float16 or bfloat16, any strides (a column slice of a projection is fine).
        weight: ``[D, W]``, oldest tap first; ``bias`` ``[D]`` or None.
        conv_state: ``[S, D, L]`` with ``L >= W - 1``, any strides. The history stands in columns ``[0, W - 1)``, oldest
            first; the same columns take the new history, and the others are left alone.
        query_start, query_end: ``[N]`` integers; ``state_slots`` ``[N]`` integers, any stride.
        has_initial_state: ``[N]`` bool; where false the history is zero and the slot is not read.
        out: ``[T, D]`` in the dtype of ``x``, any strides, not overlapping ``x``.
        snapshot_positions, snapshot_slots: ``[N]`` integers, both or neither: the history as it stands after that many
            tokens of the row goes to columns ``[0, W - 1)`` of that slot too. Nothing is stored where the slot is
            negative or the position lies outside 1..length. No row may read or write a slot given here.
        activation: ``"silu"`` or None.
        backend: None (Triton on CUDA, else the reference), ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    check_conv(x, weight, bias, conv_state, out, activation)
    rows = check_prefill_rows(x, query_start, query_end, state_slots, has_initial_state)
    check_optional(rows, x, snapshot_positions=snapshot_positions, snapshot_slots=snapshot_slots)
    snapshot = None
    if snapshot_positions is not None and snapshot_slots is not None:
        snapshot = (snapshot_positions, snapshot_slots)
    chosen = choose(x, backend)
    if rows == 0 or x.numel() == 0:
        return
    _implementation(chosen).causal_conv1d_prefill(
        x, weight, bias, conv_state, query_start, query_end, state_slots, has_initial_state, out, activation, snapshot
    )


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    *,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    num_accepted_tokens: Tensor | None,
    max_query_len: int,
    out: Tensor,
    snapshot_slots: Tensor | None = None,
    activation: str | None = "silu",
    backend: str | None = None,
) -> None:
    """Convolve the one or few new tokens of every row (decode, or verification of draft tokens), in place.

    With k = ``num_accepted_tokens[n]``, the tokens of the previous update that were kept (1 when None), the history
    stands in columns ``[k - 1, k - 1 + W - 1)`` of the slot. Afterwards columns ``[0, W - 2)`` hold all of it but the
    oldest input and the columns from W - 2 on hold the row's n new inputs, so that any k in 1..n picks the right window
    next time; further columns are left alone.

    Args:
        x, weight, bias, out, activation, backend: as for :func:`causal_conv1d_prefill`.
        conv_state: ``[S, D, L]`` with ``L >= W - 2 + max_query_len``, any strides.
        query_start, query_end, state_slots, num_accepted_tokens: ``[N]`` integers.
        max_query_len: no row is longer; it bounds the work and may be a host constant of a captured graph.
        snapshot_slots: ``[N]`` integers or None: the W - 1 inputs up to the row's last one go to columns
            ``[0, W - 1)`` of that slot too, where it is not negative. No row may read or write a slot given here.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or the state is too short for ``max_query_len``.
    """
    check_conv(x, weight, bias, conv_state, out, activation)
    rows = check_update_rows(
        x, weight, conv_state, query_start, query_end, state_slots, num_accepted_tokens, max_query_len
    )
    check_optional(rows, x, snapshot_slots=snapshot_slots)
    chosen = choose(x, backend)
    if rows == 0 or x.numel() == 0 or max_query_len == 0:
        return
    _implementation(chosen).causal_conv1d_update(
        x,
        weight,
        bias,
        conv_state,
        query_start,
        query_end,
        state_slots,
        num_accepted_tokens,
        max_query_len,
        out,
        activation,
        snapshot_slots,
    )
