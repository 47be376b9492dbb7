"""The kernel of :mod:`.triton_tiled` that needs the state: the walk through a row's chunks."""

import triton
import triton.language as tl

from .triton_formula import as_stored

_ROWS = ["query_start", "query_end", "slots", "has_initial_state", "snapshot_positions", "snapshot_slots"]


@triton.jit(do_not_specialize=["slots_stride"], do_not_specialize_on_alignment=_ROWS)
def walk_kernel(
    qkv,
    W_in,
    U_in,
    P_in,
    q_scales,
    k_scales,
    carries,
    state,
    out,
    query_start,
    query_end,
    slots,
    has_initial_state,
    snapshot_positions,
    snapshot_slots,
    first_numbers,
    qkv_token,
    qkv_column,
    state_slot,
    state_head,
    state_v,
    state_k,
    out_token,
    out_head,
    out_v,
    slots_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
    DOT: tl.constexpr,
):
    """BLOCK_V columns of the state of one row and head, from chunk to chunk; what is past a row's end adds nothing."""
    BLOCKS: tl.constexpr = VALUE_DIM // BLOCK_V
    of_rows = tl.program_id(0) // BLOCKS
    row = of_rows // V_HEADS
    head = of_rows % V_HEADS
    k_head = head // (V_HEADS // K_HEADS)
    start = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_end + row).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (end <= start):
        return
    number = tl.load(first_numbers + row)
    c = tl.arange(0, CHUNK)
    k_index = tl.arange(0, KEY_DIM)
    first_v = tl.program_id(0) % BLOCKS * BLOCK_V  # side by side: all but U and the output is common
    v_index = first_v + tl.arange(0, BLOCK_V)

    # Held transposed, [K, V]: every product then has the chunk or K as its tall side.
    state_at = state + slot * state_slot + head * state_head
    state_at += k_index[:, None].to(tl.int64) * state_k + v_index[None, :].to(tl.int64) * state_v
    s = tl.zeros((KEY_DIM, BLOCK_V), tl.float32)
    if tl.load(has_initial_state + row):
        s = tl.load(state_at).to(tl.float32)
    tl.debug_barrier()  # an element may be held by several threads: all have read before one writes

    if HAS_SNAPSHOT:
        snapshot = tl.load(snapshot_slots + row).to(tl.int64)
        snapshot_end = start + tl.load(snapshot_positions + row).to(tl.int64)
        snapshot_end = tl.where(snapshot >= 0, snapshot_end, -1)  # no chunk ends there

    length = (end - start).to(tl.int32)
    chunks = (length + CHUNK - 1) // CHUNK
    first_tile = number.to(tl.int64) * V_HEADS + head
    k_cell = c[:, None] * KEY_DIM + k_index[None, :]
    v_cell = c[:, None] * VALUE_DIM + v_index[None, :]
    p_cell = c[:, None] * CHUNK + c[None, :]
    q_from = qkv + start * qkv_token + k_head * KEY_DIM * qkv_column
    k_from = q_from + K_HEADS * KEY_DIM * qkv_column
    out_from = out + start * out_token + head * out_head
    # One chunk ahead: the factors are needed late in a step, where nothing would hide that they are on their way.
    next_k_scale = tl.load(k_scales + first_tile * CHUNK + c)
    next_q_scale = tl.load(q_scales + first_tile * CHUNK + c)
    next_carried = tl.load(carries + first_tile)
    for i in range(0, chunks):
        tile = first_tile + i * V_HEADS
        k_scale, q_scale, carried = next_k_scale, next_q_scale, next_carried
        after = first_tile + tl.minimum(i + 1, chunks - 1) * V_HEADS
        next_k_scale = tl.load(k_scales + after * CHUNK + c)
        next_carried = tl.load(carries + after)
        token = tl.minimum(i * CHUNK + c, length - 1)
        token_at = token.to(tl.int64)[:, None] * qkv_token + k_index[None, :] * qkv_column
        W = tl.load(W_in + tile * (CHUNK * KEY_DIM) + k_cell)
        U = tl.load(U_in + tile * (CHUNK * VALUE_DIM) + v_cell)
        k = tl.load(k_from + token_at)
        s_dot = s.to(DOT)
        written = U.to(tl.float32) - tl.dot(W, s_dot)
        next_q_scale = tl.load(q_scales + after * CHUNK + c)
        q = tl.load(q_from + token_at)
        P = tl.load(P_in + tile * (CHUNK * CHUNK) + p_cell)
        o = tl.dot(q.to(DOT), s_dot) * q_scale[:, None]
        o = tl.dot(P, written.to(DOT), o)
        out_at = out_from + token.to(tl.int64)[:, None] * out_token + v_index[None, :] * out_v
        tl.store(out_at, o.to(out.dtype.element_ty), mask=(i * CHUNK + c < length)[:, None])
        s = tl.dot(tl.trans(k.to(DOT)), (written * k_scale[:, None]).to(DOT), s * carried)
        if HAS_SNAPSHOT:
            if start + tl.minimum((i + 1) * CHUNK, length) == snapshot_end:
                kept = tl.load(snapshot_slots + row).to(tl.int64)  # anew, as below
                late = tl.minimum(kept, 0)
                snapshot_at = state + kept * state_slot + head * state_head
                snapshot_at += (k_index[:, None] + late) * state_k + (v_index[None, :] + late) * state_v
                tl.store(snapshot_at, as_stored(s, state))

    # Addresses that hang on the slot read anew: those from above would be kept in registers all along.
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    late = tl.minimum(slot, 0)
    state_at = state + slot * state_slot + head * state_head
    state_at += (k_index[:, None] + late) * state_k + (v_index[None, :] + late) * state_v
    tl.store(state_at, as_stored(s, state))
