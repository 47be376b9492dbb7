"""A decode step's kernel for batches that fill a GPU: tiles of the state come through shared memory, stages ahead."""

import triton
import triton.language as tl

from ..ranges import covered
from .triton_formula import advance_once, as_stored, decay_of
from .triton_window import advance_keys, advance_window


# As of the kernel in `triton_decode`: a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_slots"],
)
def gdn_decode_staged_kernel(
    qkv,
    z,
    a,
    b,
    conv_weight,
    A_log,
    dt_bias,
    norm_weight,
    windows,
    state,
    out,
    scratch,
    query_start,
    query_end,
    slots,
    snapshot_slots,
    num_rows,
    num_tokens,
    scale,
    norm_eps,
    qkv_token,
    qkv_column,
    z_token,
    z_head,
    z_v,
    a_token,
    a_head,
    b_token,
    b_head,
    weight_channel,
    weight_tap,
    window_slot,
    window_channel,
    window_column,
    state_slot,
    state_head,
    state_v,
    state_k,
    out_token,
    out_head,
    out_v,
    slots_stride,
    K_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
    BLOCK_GROUP: tl.constexpr,
    TILES: tl.constexpr,
    STAGES: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    """``scratch [num_rows, K_HEADS, 2, GROUP, VALUE_DIM]`` float32: v once convolved, then outputs before the norm.

    A head has TILES tiles of BLOCK_V rows and up to BLOCK_HEAD rows, a key head up to BLOCK_GROUP value heads.
    """
    # One program a row and key head, for all of its value heads: alone it reads and moves that key head's windows.
    place = (tl.program_id(0) // K_HEADS).to(tl.int64)  # a row, and a token of the same number
    k_head = tl.program_id(0) % K_HEADS
    first_head = k_head * GROUP
    start = tl.load(query_start + place, mask=place < num_rows, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=place < num_rows, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=place < num_rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (end > start)
    group = tl.arange(0, BLOCK_GROUP)
    heads, in_group = first_head + group, group < GROUP
    k_index = tl.arange(0, BLOCK_K)
    v_all = tl.arange(0, BLOCK_HEAD)
    inside = in_group[:, None] & (v_all < VALUE_DIM)[None, :]
    out_at = heads[:, None] * out_head + v_all[None, :] * out_v

    # Row n has token n as a rule; every other token looks for its row, and has zeros if there is none.
    alone = (place < num_tokens) & ((start != place) | (live == 0))
    if alone:
        token = place + tl.arange(0, 1)
        if tl.max(covered(token, query_start, query_end, 1, slots, slots_stride, num_rows, BLOCK_ROWS), 0) == 0:
            zeros = tl.zeros((BLOCK_GROUP, BLOCK_HEAD), tl.float32).to(out.dtype.element_ty)
            tl.store(out + place * out_token + out_at, zeros, mask=inside)
    if live == 0:
        return

    snapshot = tl.load(snapshot_slots + place).to(tl.int64) if HAS_SNAPSHOT else slot
    x = qkv + start * qkv_token
    q, k = advance_keys(
        x,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        windows,
        window_slot,
        window_channel,
        window_column,
        slot,
        snapshot,
        k_head,
        k_index,
        scale,
        K_HEADS,
        KEY_DIM,
        WIDTH,
        BLOCK_W,
        HAS_SNAPSHOT,
    )
    # All windows are moved before the loop. What a tile needs of v goes through memory, as do its outputs: registers
    # cannot be indexed by a tile's number.
    flat = tl.arange(0, BLOCK_GROUP * BLOCK_HEAD)
    group_of, v_of = flat // BLOCK_HEAD, flat % BLOCK_HEAD
    v = advance_window(
        x,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        windows,
        window_slot,
        window_channel,
        window_column,
        slot,
        snapshot,
        2 * K_HEADS * KEY_DIM + (first_head + group_of) * VALUE_DIM + v_of,
        (group_of < GROUP) & (v_of < VALUE_DIM),
        WIDTH,
        BLOCK_W,
        HAS_SNAPSHOT,
    )
    values = scratch + (place * K_HEADS + k_head) * (2 * GROUP * VALUE_DIM)
    raw = values + GROUP * VALUE_DIM
    of_group = group[:, None] * VALUE_DIM + v_all[None, :]
    tl.store(values + of_group, tl.reshape(v, (BLOCK_GROUP, BLOCK_HEAD)), mask=inside)
    tl.debug_barrier()  # other threads read it, and no load of the loop's can be asked for before
    log_rates = tl.load(A_log + heads, mask=in_group, other=0.0).to(tl.float32)
    biases = tl.load(dt_bias + heads, mask=in_group, other=0.0).to(tl.float32)
    a_values = tl.load(a + start * a_token + heads * a_head, mask=in_group, other=0.0).to(tl.float32)
    decays = decay_of(a_values, log_rates, biases)
    betas = tl.sigmoid(tl.load(b + start * b_token + heads * b_head, mask=in_group, other=0.0).to(tl.float32))

    # Tiles of later iterations are asked for before this one's is stored: all are different memory, in the running slot
    # and in the snapshot's, and nothing else that the loop loads is written in it.
    rows_of_tile = tl.arange(0, BLOCK_V)
    state_at = state + slot * state_slot + first_head * state_head
    state_at += rows_of_tile[:, None] * state_v + k_index[None, :] * state_k
    for tile in tl.range(0, GROUP * TILES, num_stages=STAGES):
        number, first_row = tile // TILES, (tile % TILES) * BLOCK_V
        at = state_at + (number * state_head + first_row * state_v)
        end_row = BLOCK_V if VALUE_DIM % BLOCK_V == 0 else VALUE_DIM - first_row  # the former is known to the compiler
        in_tile = rows_of_tile < end_row
        whole = in_tile[:, None] & (k_index < KEY_DIM)[None, :]
        s = tl.load(at, mask=whole, other=0.0).to(tl.float32)
        of_tile = number * VALUE_DIM + first_row + rows_of_tile
        v_tile = tl.load(values + of_tile, mask=in_tile, other=0.0)
        mine = group == number
        decay, beta = tl.sum(tl.where(mine, decays, 0.0), 0), tl.sum(tl.where(mine, betas, 0.0), 0)
        s, o = advance_once(s, q, k, v_tile, decay, beta)
        tl.store(at, as_stored(s, state), mask=whole)
        if HAS_SNAPSHOT:
            kept = (rows_of_tile < tl.where(snapshot >= 0, end_row, 0))[:, None] & (k_index < KEY_DIM)[None, :]
            tl.store(at + (snapshot - slot) * state_slot, as_stored(s, state), mask=kept)
        tl.store(raw + of_tile, o, mask=in_tile)

    tl.debug_barrier()  # the norm's threads are others than the tiles'
    o_all = tl.load(raw + of_group, mask=inside, other=0.0)
    gate_at = z + start * z_token + heads[:, None] * z_head + v_all[None, :] * z_v
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    norm = tl.load(norm_weight + v_all, mask=v_all < VALUE_DIM, other=0.0).to(tl.float32)[None, :]
    root = tl.rsqrt(tl.sum(o_all * o_all, 1) / VALUE_DIM + norm_eps)[:, None]
    y = o_all * root * norm * gate * tl.sigmoid(gate)
    tl.store(out + start * out_token + out_at, y.to(out.dtype.element_ty), mask=inside)
