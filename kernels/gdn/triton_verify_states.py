"""The verification of drafts that leaves the state after each token, and the windows as `causal_conv1d_update` does.

States are written far more than they are read, and what goes between is hidden behind that as long as it is little. So
tiles are small, several programs share a multiprocessor, and a tile holds K in parts, for cheap sums over it
(:func:`.triton_formula.advance_parts`).
"""

import triton
import triton.language as tl

from .triton_drafts import gates_of, row_at, store_normed, zero_tokens_without_row
from .triton_formula import EPSILON, advance_parts, as_stored
from .triton_inputs import convolved_in_place, side_by_side


@triton.jit
def _column(x, j):
    """Column j of [N, M], of which a thread holds whole rows."""
    return tl.sum(tl.where((tl.arange(0, x.shape[1]) == j)[None, :], x, 0.0), 1)


@triton.jit
def _normalized(x):
    """Columns [K, M] of length one."""
    return x / tl.sqrt(tl.sum(x * x, 0) + EPSILON)[None, :]


# What is not specialised on is as for the verifications that leave records.
@triton.jit(
    do_not_specialize=[
        "num_rows",
        "num_tokens",
        "max_query_len",
        "conv_slots_stride",
        "slots_stride",
        "output_slots_row",
        "output_slots_token",
    ],
    do_not_specialize_on_alignment=[
        "query_start",
        "query_end",
        "conv_slots",
        "slots",
        "output_slots",
        "num_accepted_tokens",
    ],
)
def gdn_verify_states_kernel(
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
    conv_slots,
    slots,
    output_slots,
    num_accepted_tokens,
    num_rows,
    num_tokens,
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
    conv_slots_stride,
    slots_stride,
    output_slots_row,
    output_slots_token,
    K_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    LEVELS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    # One program a row and key head, for all of its value heads: alone it reads and moves that key head's windows.
    place = (tl.program_id(0) // K_HEADS).to(tl.int64)  # a row, and as many tokens of the same numbers
    k_head = tl.program_id(0) % K_HEADS
    first_head = k_head * GROUP
    start, length, slot = row_at(place, query_start, query_end, slots, slots_stride, num_rows, max_query_len)
    for head in range(first_head, first_head + GROUP):
        zero_tokens_without_row(
            place,
            start,
            length,
            slot,
            query_start,
            query_end,
            slots,
            slots_stride,
            num_rows,
            num_tokens,
            max_query_len,
            out + head * out_head,
            out_token,
            out_v,
            VALUE_DIM,
            BLOCK_M,
            V_BLOCKS * BLOCK_V,
            BLOCK_ROWS,
        )
    if (slot < 0) | (length <= 0):
        return

    k_index = tl.arange(0, BLOCK_K)
    parts = tl.arange(0, PARTS)[:, None] * (BLOCK_K // PARTS) + tl.arange(0, BLOCK_K // PARTS)[None, :]
    x = qkv + start * qkv_token
    window = windows + tl.load(conv_slots + place * conv_slots_stride).to(tl.int64) * window_slot
    first_column = tl.load(num_accepted_tokens + place).to(tl.int32) - 1
    k_all = convolved_in_place(
        x,
        qkv_token,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        window,
        first_column,
        window_channel,
        window_column,
        (K_HEADS + k_head) * KEY_DIM,
        k_index,
        KEY_DIM,
        length,
        WIDTH,
        BLOCK_M,
        BLOCK_M,
    )
    q_all = convolved_in_place(
        x,
        qkv_token,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        window,
        first_column,
        window_channel,
        window_column,
        k_head * KEY_DIM,
        k_index,
        KEY_DIM,
        length,
        WIDTH,
        BLOCK_M,
        BLOCK_M,
    )
    k_all = _normalized(side_by_side(k_all, LEVELS))
    q_all = _normalized(side_by_side(q_all, LEVELS)) * scale
    token = tl.arange(0, BLOCK_M)
    in_row = token < length
    at = start + token
    v_all = tl.arange(0, V_BLOCKS * BLOCK_V)
    in_core = (v_all < VALUE_DIM)[:, None] & in_row[None, :]
    core = scratch + tl.program_id(0).to(tl.int64) * (BLOCK_M * VALUE_DIM)
    targets = output_slots + place * output_slots_row

    for head in range(first_head, first_head + GROUP):
        head_a, head_b = a + head * a_head, b + head * b_head
        decay, beta = gates_of(head_a, head_b, a_token, b_token, A_log + head, dt_bias + head, at, in_row)
        for i in range((VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
            v_index = i * BLOCK_V + tl.arange(0, BLOCK_V)
            inside = (v_index < VALUE_DIM)[None, :, None] & (parts < KEY_DIM)[:, None, :]
            state_tile = state + head * state_head + v_index[None, :, None] * state_v + parts[:, None, :] * state_k
            # All threads meet in the convolution, behind this read of what the row may write over, and before outputs
            # take the place of the last head's.
            s = tl.load(state_tile + slot * state_slot, mask=inside, other=0.0).to(tl.float32)
            values = convolved_in_place(
                x,
                qkv_token,
                qkv_column,
                conv_weight,
                weight_channel,
                weight_tap,
                window,
                first_column,
                window_channel,
                window_column,
                2 * K_HEADS * KEY_DIM + head * VALUE_DIM,
                v_index,
                VALUE_DIM,
                length,
                WIDTH,
                BLOCK_M,
                BLOCK_M,
            )
            v = side_by_side(values, LEVELS)
            for j in range(length.to(tl.int32)):
                now = token == j
                k = tl.reshape(_column(k_all, j), (PARTS, BLOCK_K // PARTS))
                q = tl.reshape(_column(q_all, j), (PARTS, BLOCK_K // PARTS))
                left, strength = tl.sum(tl.where(now, decay, 0.0), 0), tl.sum(tl.where(now, beta, 0.0), 0)
                s, o = advance_parts(s, q, k, _column(v, j), left, strength)
                tl.store(core + j * VALUE_DIM + v_index, o, mask=v_index < VALUE_DIM)
                target = tl.load(targets + j * output_slots_token).to(tl.int64)
                if target >= 0:
                    tl.store(state_tile + target * state_slot, as_stored(s, state), mask=inside)

        tl.debug_barrier()  # outputs go from the threads that had them to those that norm them
        o = tl.load(core + token[None, :] * VALUE_DIM + v_all[:, None], mask=in_core, other=0.0)[None, :, :]
        z_at, out_at = z + head * z_head, out + head * out_head
        store_normed(o, at, in_row, z_at, z_token, z_v, norm_weight, norm_eps, out_at, out_token, out_v, VALUE_DIM)
