"""The verification of drafts that takes the state from token to token."""

import triton
import triton.language as tl

from .triton_drafts import gates_of, row_at, store_normed, zero_tokens_without_row
from .triton_formula import EPSILON, advance


@triton.jit
def _convolve(
    x,
    x_token,
    x_column,
    taps,
    weight_channel,
    weight_tap,
    window,
    window_channel,
    window_column,
    kept,
    channel,
    in_dim,
    token,
    length,
    recorded,
    WIDTH: tl.constexpr,
    CONV_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """These channels of a row's tokens, convolved, [BLOCK_M, BLOCK_D]; the first `recorded` inputs go to `kept`.

    One sum over the taps, whether an input stands in the window or in the row: a row gives the same bits as the same
    tokens verified and committed one by one. (All tokens at once have `.triton_inputs.convolved`.)
    """
    y = tl.zeros((BLOCK_M, BLOCK_D), tl.float32)
    x = x + channel[None, :] * x_column
    window = window + channel[None, :] * window_channel
    for tap in tl.static_range(WIDTH):
        source = token + (tap - (WIDTH - 1))
        new = ((source >= 0) & (token < length))[:, None] & in_dim[None, :]
        value = tl.load(x + source[:, None] * x_token, mask=new, other=0.0)
        if tap == WIDTH - 1:
            target = kept + token[:, None] * CONV_DIM + channel[None, :]
            tl.store(target, value.to(tl.float32).to(kept.dtype.element_ty), mask=new & (token < recorded)[:, None])
        value = value.to(tl.float32)
        if tap < WIDTH - 1:
            column = token + tap
            old = (column < WIDTH - 1)[:, None] & in_dim[None, :]
            value += tl.load(window + column[:, None] * window_column, mask=old, other=0.0).to(tl.float32)
        w = tl.load(taps + channel * weight_channel + tap * weight_tap, mask=in_dim, other=0.0).to(tl.float32)
        y += value * w[None, :]
    return y * tl.sigmoid(y)


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's,
# nor where a layer's decays do: a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "num_records", "record_tokens", "max_query_len", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "decays"],
)
def gdn_verify_steps_kernel(
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
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
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

    k_index = tl.arange(0, BLOCK_K)
    k_mask = k_index < KEY_DIM
    token = tl.arange(0, BLOCK_M)
    in_row = token < length
    record = place * record_tokens
    x = qkv + start * qkv_token
    window = windows + slot * window_slot
    kept = inputs + record * CONV_DIM
    recorded = tl.where(head % GROUP == 0, length, 0)
    q_channel = k_head * KEY_DIM + k_index
    q = _convolve(
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
        q_channel,
        k_mask,
        token,
        length,
        recorded,
        WIDTH,
        CONV_DIM,
        BLOCK_M,
        BLOCK_K,
    )
    k = _convolve(
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
        K_HEADS * KEY_DIM + q_channel,
        k_mask,
        token,
        length,
        recorded,
        WIDTH,
        CONV_DIM,
        BLOCK_M,
        BLOCK_K,
    )
    q = q * (scale / tl.sqrt(tl.sum(q * q, 1) + EPSILON))[:, None]
    k = k / tl.sqrt(tl.sum(k * k, 1) + EPSILON)[:, None]
    k_record = keys + ((record + token[:, None]) * K_HEADS + k_head) * KEY_DIM + k_index[None, :]
    tl.store(k_record, k, mask=(token < recorded)[:, None] & k_mask[None, :])

    at = start + token
    a, b = a + head * a_head, b + head * b_head
    decay, beta = gates_of(a, b, a_token, b_token, A_log + head, dt_bias + head, at, in_row)
    tl.store(decays + (record + token) * V_HEADS + head, decay, mask=in_row)

    block = tl.arange(0, V_BLOCKS)
    o_all = tl.zeros((V_BLOCKS, BLOCK_V, BLOCK_M), tl.float32)
    state_at = state + slot * state_slot + head * state_head
    for i in range((VALUE_DIM + BLOCK_V - 1) // BLOCK_V):
        v_index = i * BLOCK_V + tl.arange(0, BLOCK_V)
        v_mask = v_index < VALUE_DIM
        tile = state_at + v_index[:, None] * state_v + k_index[None, :] * state_k
        s = tl.load(tile, mask=v_mask[:, None] & k_mask[None, :], other=0.0).to(tl.float32)
        v = _convolve(
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
            2 * K_HEADS * KEY_DIM + head * VALUE_DIM + v_index,
            v_mask,
            token,
            length,
            length,
            WIDTH,
            CONV_DIM,
            BLOCK_M,
            BLOCK_V,
        )
        for j in range(length.to(tl.int32)):
            now = token == j
            s, written, o = advance(
                s,
                tl.sum(tl.where(now[:, None], q, 0.0), 0),
                tl.sum(tl.where(now[:, None], k, 0.0), 0),
                tl.sum(tl.where(now[:, None], v, 0.0), 0),
                tl.sum(tl.where(now, decay, 0.0), 0),
                tl.sum(tl.where(now, beta, 0.0), 0),
            )
            tl.store(writes + ((record + j) * V_HEADS + head) * VALUE_DIM + v_index, written, mask=v_mask)
            o_all = tl.where((block == i)[:, None, None] & now[None, None, :], o[None, :, None], o_all)

    z_head_at = z + head * z_head
    store_normed(
        o_all, at, in_row, z_head_at, z_token, z_v, norm_weight, norm_eps, out_head_at, out_token, out_v, VALUE_DIM
    )
