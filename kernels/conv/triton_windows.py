"""Windows of the short convolution in Triton: the last inputs of rows, moved to their slots."""

import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv

# The state is shifted in place. That is safe because every channel's columns are read and written by one thread, which
# holds as long as a block has at least one channel a thread.
NUM_WARPS = 4
BLOCK_D = 32 * NUM_WARPS


@triton.jit
def store_window(
    target,
    target_column,
    history,
    history_column,
    has_history,
    x_row,
    x_token,
    length,
    in_dim,
    WIDTH: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Store the W - 1 inputs that end after `length` tokens of a row; those before its first token are its history.

    Columns go lowest first, so `target` may be where the history stands.
    """
    for column in tl.static_range(WIDTH - 1):
        position = length - (WIDTH - 1) + column
        last = tl.zeros((BLOCK_D,), tl.float32)
        if position >= 0:
            last = tl.load(x_row + position * x_token, mask=in_dim, other=0.0).to(tl.float32)
        elif has_history:
            last = tl.load(history + (length + column) * history_column, mask=in_dim, other=0.0).to(tl.float32)
        tl.store(target + column * target_column, last.to(target.dtype.element_ty), mask=in_dim)


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["slots_stride"],
    do_not_specialize_on_alignment=[
        "query_start",
        "query_end",
        "slots",
        "has_initial_state",
        "snapshot_positions",
        "snapshot_slots",
    ],
)
def _windows_kernel(
    x,
    state,
    query_start,
    query_end,
    slots,
    has_initial_state,
    snapshot_positions,
    snapshot_slots,
    dim,
    x_token,
    x_dim,
    state_slot,
    state_dim,
    state_column,
    slots_stride,
    WIDTH: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A launch of its own, when all that a row's first tokens need of its old window has been read."""
    row = tl.program_id(0).to(tl.int64)
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_end + row).to(tl.int64) - start
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (length <= 0):
        return
    has = tl.load(has_initial_state + row) != 0
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = d < dim
    x_row = x + start * x_token + d * x_dim
    window = state + slot * state_slot + d * state_dim
    if HAS_SNAPSHOT:
        taken = tl.load(snapshot_positions + row).to(tl.int64)
        target = tl.load(snapshot_slots + row).to(tl.int64)
        if (target >= 0) & (taken > 0) & (taken <= length):
            kept = state + target * state_slot + d * state_dim
            store_window(
                kept, state_column, window, state_column, has, x_row, x_token, taken, mask, WIDTH, BLOCK_D
            )  # fmt: skip
    store_window(window, state_column, window, state_column, has, x_row, x_token, length, mask, WIDTH, BLOCK_D)


def move_windows(
    x: Tensor,
    width: int,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """Leave each row's last W - 1 inputs, those of ``x [T, D]`` and before them its history, in its slot, and those up
    to a snapshot's position in that one's; skipped and empty rows have none. For after the convolution of all of them.
    """
    _windows_kernel[(query_start.shape[0], cdiv(x.shape[1], BLOCK_D))](
        x,
        conv_state,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        *(snapshot or (query_start, query_start)),
        x.shape[1],
        *x.stride(),
        *conv_state.stride(),
        state_slots.stride(0),
        WIDTH=width,
        HAS_SNAPSHOT=snapshot is not None,
        BLOCK_D=BLOCK_D,
        num_warps=NUM_WARPS,
    )
