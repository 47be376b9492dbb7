"""The states of slot-addressed rows, brought before an engine's own prefill function and back to their slots after it.

The functions want the states of the rows one behind the other in float32, and return the final ones the same way.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from .packed import PackedRows
from .triton_formula import as_stored

BLOCK_V = 32


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(do_not_specialize=["slots_stride"], do_not_specialize_on_alignment=["slots", "has_initial_state"])
def _collect_kernel(
    state,
    collected,
    slots,
    has_initial_state,
    state_slot,
    state_head,
    state_v,
    state_k,
    slots_stride,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The state each row starts from, in float32; zeros where it has none or is skipped."""
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = (v_index < VALUE_DIM)[:, None] & (k_index < KEY_DIM)[None, :]
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    at = state + slot * state_slot + head * state_head
    at += v_index[:, None].to(tl.int64) * state_v + k_index[None, :].to(tl.int64) * state_k
    s = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    if slot >= 0:
        if tl.load(has_initial_state + row):
            s = tl.load(at, mask=tile, other=0.0).to(tl.float32)
    to = ((row * V_HEADS + head) * VALUE_DIM + v_index[:, None]) * KEY_DIM + k_index[None, :]
    tl.store(collected + to, s, mask=tile)


@triton.jit(
    do_not_specialize=["slots_stride", "grid"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_positions", "snapshot_slots"],
)
def _put_back_kernel(
    final,
    checkpoints,
    checkpoint_offsets,
    state,
    query_start,
    query_end,
    slots,
    snapshot_positions,
    snapshot_slots,
    state_slot,
    state_head,
    state_v,
    state_k,
    slots_stride,
    grid,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    """Final states to the rows' slots, and what is to be kept besides, from the states on the grid, to its slots."""
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    length = tl.load(query_end + row).to(tl.int64) - tl.load(query_start + row).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (length <= 0):
        return
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = (v_index < VALUE_DIM)[:, None] & (k_index < KEY_DIM)[None, :]
    within = (head * VALUE_DIM + v_index[:, None]).to(tl.int64) * KEY_DIM + k_index[None, :]
    one = V_HEADS * VALUE_DIM * KEY_DIM
    at = state + head * state_head
    at += v_index[:, None].to(tl.int64) * state_v + k_index[None, :].to(tl.int64) * state_k
    s = tl.load(final + row * one + within, mask=tile, other=0.0).to(tl.float32)
    tl.store(at + slot * state_slot, as_stored(s, state), mask=tile)
    if HAS_SNAPSHOT:
        target = tl.load(snapshot_slots + row).to(tl.int64)
        position = tl.load(snapshot_positions + row).to(tl.int64)
        if (target >= 0) & (position > 0) & (position <= length):
            on_grid = position % grid == 0
            if on_grid | (position == length):
                if position < length:
                    place = tl.load(checkpoint_offsets + row).to(tl.int64) + position // grid - 1
                    s = tl.load(checkpoints + place * one + within, mask=tile, other=0.0).to(tl.float32)
                tl.store(at + target * state_slot, as_stored(s, state), mask=tile)


def collect(ssm_state: Tensor, state_slots: Tensor, has_initial_state: Tensor) -> Tensor:
    """The rows' initial states ``[N, HV, V, K]`` in float32, contiguous; zeros for rows without, and skipped ones."""
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows = state_slots.shape[0]
    collected = torch.empty(rows, v_heads, value_dim, key_dim, dtype=torch.float32, device=ssm_state.device)
    _collect_kernel[(rows * v_heads, cdiv(value_dim, BLOCK_V))](
        ssm_state,
        collected,
        state_slots,
        has_initial_state,
        *ssm_state.stride(),
        state_slots.stride(0),
        **_tiles(ssm_state),
    )
    return collected


def put_back(
    final: Tensor,
    checkpoints: Tensor | None,
    packed: PackedRows,
    ssm_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """Write final states ``[N, HV, V, K]``, and snapshots if any, into their slots; skipped rows write nothing.

    ``checkpoints [packed.checkpoints, HV, V, K]``: the state after every ``packed.snapshot_grid`` tokens of each row,
    row after row; needed with ``snapshot`` (positions and slots, as for a prefill).
    """
    _, v_heads, value_dim, _ = ssm_state.shape
    positions, targets = snapshot or (query_start, query_start)
    _put_back_kernel[(final.shape[0] * v_heads, cdiv(value_dim, BLOCK_V))](
        final,
        final if checkpoints is None else checkpoints,
        packed.cu_seqlens if checkpoints is None else packed.checkpoint_offsets,
        ssm_state,
        query_start,
        query_end,
        state_slots,
        positions,
        targets,
        *ssm_state.stride(),
        state_slots.stride(0),
        packed.snapshot_grid,
        HAS_SNAPSHOT=snapshot is not None,
        **_tiles(ssm_state),
    )


def _tiles(ssm_state: Tensor) -> dict[str, int]:
    _, v_heads, value_dim, key_dim = ssm_state.shape
    return {
        "V_HEADS": v_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": next_power_of_2(key_dim),
        "BLOCK_V": BLOCK_V,
    }
