"""The verification of drafts that reads the state once for all tokens of a row: :mod:`.triton_projection`.

Token by token, every token waits for sums over K of the whole state after the one before it. Here the state meets all
keys and queries in one product of matrix units, and what goes from token to token is 2 M columns in registers.
"""

import triton
import triton.language as tl

from .triton_drafts import gates_of, row_at, store_normed, zero_tokens_without_row
from .triton_formula import EPSILON
from .triton_inputs import convolved, side_by_side
from .triton_projection import gram_of, pass_token, times_state

UNROLLED = tl.constexpr(4)  # tokens up to which an unrolled loop was the faster one


# What is not specialised on is as for verification token by token.
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "num_records", "record_tokens", "max_query_len", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "decays"],
)
def gdn_verify_projected_kernel(
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
    inputs,
    keys,
    writes,
    decays,
    out,
    query_start,
    query_end,
    slots,
    num_rows,
    num_tokens,
    num_records,
    record_tokens,
    max_query_len,
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
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PLACES: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    UPCAST: tl.constexpr,
):
    # One program a row and value head. Nothing that another program reads is written, so q and k are simply computed
    # again by every value head of a key head; the first one of them records what is theirs.
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    CONV_DIM: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    place = (tl.program_id(0) // V_HEADS).to(tl.int64)  # a row, and as many tokens of the same numbers
    head = tl.program_id(0) % V_HEADS
    k_head = head // GROUP
    rows = tl.minimum(num_rows, num_records)
    start, length, slot = row_at(place, query_start, query_end, slots, slots_stride, rows, max_query_len)
    out_head_at = out + head * out_head
    zero_tokens_without_row(
        place,
        start,
        length,
        slot,
        query_start,
        query_end,
        slots,
        slots_stride,
        rows,
        num_tokens,
        max_query_len,
        out_head_at,
        out_token,
        out_v,
        VALUE_DIM,
        BLOCK_M,
        V_BLOCKS * BLOCK_V,
        BLOCK_ROWS,
    )
    if (slot < 0) | (length <= 0):
        return

    # The largest read by far is asked for first, each further tile before this one is worked on.
    v_row = tl.arange(0, BLOCK_V)
    k_index = tl.arange(0, BLOCK_K)
    k_mask = k_index < KEY_DIM
    state_at = state + slot * state_slot + head * state_head
    s_offset = v_row[:, None] * state_v + k_index[None, :] * state_k
    ahead = tl.load(state_at + s_offset, mask=(v_row < VALUE_DIM)[:, None] & k_mask[None, :], other=0.0)

    record = place * record_tokens
    x = qkv + start * qkv_token
    window = windows + slot * window_slot
    kept = inputs + record * CONV_DIM
    recorded = tl.where(head % GROUP == 0, length, 0)
    k_all = convolved(
        x,
        qkv_token,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        window,
        window_channel,
        window_column,
        kept,
        (K_HEADS + k_head) * KEY_DIM,
        k_index,
        KEY_DIM,
        length,
        recorded,
        WIDTH,
        CONV_DIM,
        BLOCK_M,
        PLACES,
    )
    q_all = convolved(
        x,
        qkv_token,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        window,
        window_channel,
        window_column,
        kept,
        k_head * KEY_DIM,
        k_index,
        KEY_DIM,
        length,
        recorded,
        WIDTH,
        CONV_DIM,
        BLOCK_M,
        PLACES,
    )
    pairs = ()
    for n in tl.static_range(PLACES):
        pairs = pairs + (k_all[n], q_all[n])
    p = side_by_side(pairs, LEVELS + 1)  # k_0, q_0, k_1, ..: a token's two in one thread, whatever multiplied them
    token = tl.arange(0, PLACES)
    in_row = token < length
    column = tl.arange(0, 2 * PLACES)
    is_key = column % 2 == 0
    gram = gram_of(p)
    own_square = tl.sum(tl.where(column[:, None] == column[None, :], gram, 0.0), 0)
    unit = tl.where(is_key, 1.0, scale) / tl.sqrt(own_square + EPSILON)
    key_at = keys + ((record + column[None, :] // 2) * K_HEADS + k_head) * KEY_DIM + k_index[:, None]
    noted = is_key & (column // 2 < recorded)
    tl.store(key_at, p * unit[None, :], mask=noted[None, :] & k_mask[:, None])
    at = start + token
    a, b = a + head * a_head, b + head * b_head
    decay, beta = gates_of(a, b, a_token, b_token, A_log + head, dt_bias + head, at, in_row)
    tl.store(decays + (record + token) * V_HEADS + head, decay, mask=in_row)

    block = tl.arange(0, V_BLOCKS)
    o_all = tl.zeros((V_BLOCKS, BLOCK_V, PLACES), tl.float32)
    for i in range(V_BLOCKS):
        s = ahead
        v_index = i * BLOCK_V + v_row
        v_mask = v_index < VALUE_DIM
        if V_BLOCKS > 1:
            following = (i + 1) * BLOCK_V
            more = following + v_row < tl.where(i + 1 < V_BLOCKS, VALUE_DIM, 0)
            ahead = tl.load(state_at + following * state_v + s_offset, mask=more[:, None] & k_mask[None, :], other=0.0)
        v_all = convolved(
            x,
            qkv_token,
            qkv_column,
            conv_weight,
            weight_channel,
            weight_tap,
            window,
            window_channel,
            window_column,
            kept,
            2 * K_HEADS * KEY_DIM + head * VALUE_DIM,
            v_index,
            VALUE_DIM,
            length,
            length,
            WIDTH,
            CONV_DIM,
            BLOCK_M,
            PLACES,
        )
        v = side_by_side(v_all, LEVELS)
        by_k, by_q = tl.split(tl.reshape(times_state(s, p, UPCAST) * unit[None, :], (BLOCK_V, PLACES, 2)))
        written = tl.zeros((BLOCK_V, PLACES), tl.float32)
        o = tl.zeros((BLOCK_V, PLACES), tl.float32)
        if BLOCK_M <= UNROLLED:
            for n in tl.static_range(BLOCK_M):
                by_k, by_q, written, o = pass_token(n, by_k, by_q, written, o, v, decay, beta, gram, unit, PLACES)
        else:
            for j in range(length.to(tl.int32)):
                by_k, by_q, written, o = pass_token(j, by_k, by_q, written, o, v, decay, beta, gram, unit, PLACES)
        write_at = writes + ((record + token[None, :]) * V_HEADS + head) * VALUE_DIM + v_index[:, None]
        tl.store(write_at, written, mask=in_row[None, :] & v_mask[:, None])
        o_all = tl.where((block == i)[:, None, None], o[None, :, :], o_all)

    z_head_at = z + head * z_head
    store_normed(
        o_all, at, in_row, z_head_at, z_token, z_v, norm_weight, norm_eps, out_head_at, out_token, out_v, VALUE_DIM
    )
