"""The commit of accepted drafts in Triton: all layers, rows and heads, and the convolution's windows, in one launch."""

import triton
import triton.language as tl
from torch import Tensor

from ..conv.triton_windows import BLOCK_D, NUM_WARPS, store_window
from ..integers import cdiv, next_power_of_2
from .records import DraftRecords
from .triton_formula import add_write, as_stored

MAX_BLOCK_V = 32


@triton.jit(
    do_not_specialize=["slots_stride", "num_records", "record_tokens"],
    do_not_specialize_on_alignment=["slots", "last_tokens", "snapshot_slots", "snapshot_tokens"],
)
def _commit_kernel(
    windows,
    state,
    inputs,
    keys,
    writes,
    decays,
    slots,
    last_tokens,
    snapshot_slots,
    snapshot_tokens,
    slots_stride,
    num_records,
    record_tokens,
    window_layer,
    window_slot,
    window_channel,
    window_column,
    state_layer,
    state_slot,
    state_head,
    state_v,
    state_k,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    CONV_DIM: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    V_BLOCKS: tl.constexpr = (VALUE_DIM + BLOCK_V - 1) // BLOCK_V
    row = tl.program_id(1).to(tl.int64)
    layer = tl.program_id(2).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    taken = tl.minimum(tl.load(last_tokens + row).to(tl.int32) + 1, record_tokens)
    if (slot < 0) | (taken <= 0):
        return
    kept = -1  # the token after which a snapshot is kept
    snapshot = slot
    if HAS_SNAPSHOT:
        snapshot = tl.load(snapshot_slots + row).to(tl.int64)
        kept = tl.where(snapshot >= 0, tl.load(snapshot_tokens + row).to(tl.int32), -1)
    record = (layer * num_records + row) * record_tokens

    tile = tl.program_id(0)
    if tile < V_HEADS * V_BLOCKS:
        head = tile // V_BLOCKS
        k_index = tl.arange(0, BLOCK_K)
        v_index = tile % V_BLOCKS * BLOCK_V + tl.arange(0, BLOCK_V)
        k_mask = k_index < KEY_DIM
        v_mask = v_index < VALUE_DIM
        inside = v_mask[:, None] & k_mask[None, :]
        place = state + layer * state_layer + head.to(tl.int64) * state_head
        place += v_index[:, None] * state_v + k_index[None, :] * state_k
        s = tl.load(place + slot * state_slot, mask=inside, other=0.0).to(tl.float32)
        tl.debug_barrier()  # of a small head one element is held by several threads: all have read before one writes
        k_place = keys + (record * K_HEADS + head // (V_HEADS // K_HEADS)) * KEY_DIM + k_index
        v_place = writes + (record * V_HEADS + head) * VALUE_DIM + v_index
        for j in range(taken):
            k = tl.load(k_place + j * (K_HEADS * KEY_DIM), mask=k_mask, other=0.0)
            written = tl.load(v_place + j * (V_HEADS * VALUE_DIM), mask=v_mask, other=0.0)
            s = add_write(s * tl.load(decays + (record + j) * V_HEADS + head), written, k)
            if HAS_SNAPSHOT:
                if j == kept:
                    tl.store(place + snapshot * state_slot, as_stored(s, state), mask=inside)
        tl.store(place + slot * state_slot, as_stored(s, state), mask=inside)
    else:
        d = (tile - V_HEADS * V_BLOCKS) * BLOCK_D + tl.arange(0, BLOCK_D)
        in_dim = d < CONV_DIM
        window = windows + layer * window_layer + d.to(tl.int64) * window_channel
        own = window + slot * window_slot
        x = inputs + record * CONV_DIM + d
        if HAS_SNAPSHOT:
            if (kept >= 0) & (kept < taken):
                store_window(
                    window + snapshot * window_slot,
                    window_column,
                    own,
                    window_column,
                    True,
                    x,
                    CONV_DIM,
                    kept + 1,
                    in_dim,
                    WIDTH,
                    BLOCK_D,
                )
        store_window(own, window_column, own, window_column, True, x, CONV_DIM, taken, in_dim, WIDTH, BLOCK_D)


def gdn_commit(
    conv_state: Tensor,
    ssm_state: Tensor,
    records: DraftRecords,
    state_slots: Tensor,
    last_tokens: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_commit`; arguments are checked there.

    A program moves ``BLOCK_V`` rows of one head's state, or the windows of ``BLOCK_D`` channels.
    """
    layers, _, v_heads, value_dim, key_dim = ssm_state.shape
    _, num_records, record_tokens, conv_dim = records.inputs.shape
    rows = min(state_slots.shape[0], num_records)
    block_v = min(MAX_BLOCK_V, next_power_of_2(value_dim))
    tiles = v_heads * cdiv(value_dim, block_v) + cdiv(conv_dim, BLOCK_D)
    _commit_kernel[(tiles, rows, layers)](
        conv_state,
        ssm_state,
        *records.tensors(),
        state_slots,
        last_tokens,
        *(snapshot or (state_slots, state_slots)),
        state_slots.stride(0),
        num_records,
        record_tokens,
        *conv_state.stride(),
        *ssm_state.stride(),
        K_HEADS=records.keys.shape[3],
        V_HEADS=v_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        WIDTH=conv_state.shape[3] + 1,
        BLOCK_K=next_power_of_2(key_dim),
        BLOCK_V=block_v,
        BLOCK_D=BLOCK_D,
        HAS_SNAPSHOT=snapshot is not None,
        num_warps=NUM_WARPS,
    )
