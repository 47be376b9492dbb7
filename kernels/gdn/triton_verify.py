"""A layer's whole verification of drafts in one Triton kernel: convolution, gates, delta rule, gated norm, records."""

import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS, covered
from .config import table_of, verify_tile
from .records import DraftRecords
from .reference import Gates
from .triton_formula import EPSILON, advance, decay_of


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
    tokens verified and committed one by one.
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
def _gdn_verify_kernel(
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
    is_row = place < tl.minimum(num_rows, num_records)
    start = tl.load(query_start + place, mask=is_row, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=is_row, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=is_row, other=-1).to(tl.int64)
    length = tl.minimum(end - start, max_query_len)
    live = (slot >= 0) & (length > 0)

    token = tl.arange(0, BLOCK_M).to(tl.int64)
    block = tl.arange(0, V_BLOCKS)
    v_all = block[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    out_head_at = out + head * out_head + v_all[None, :, :] * out_v

    # Row n has its tokens from n * max_query_len on as a rule; other tokens look for a row, and have zeros without one.
    first = place * max_query_len
    alone = (first < num_tokens) & ((start != first) | (length != max_query_len) | (live == 0))
    if alone:
        own = first + token
        rows = tl.minimum(num_rows, num_records)
        found = covered(own, query_start, query_end, max_query_len, slots, slots_stride, rows, BLOCK_ROWS)
        empty = (token < max_query_len) & (own < num_tokens) & (found == 0)
        zeros = tl.zeros((BLOCK_M, V_BLOCKS, BLOCK_V), tl.float32).to(out.dtype.element_ty)
        in_head = (v_all < VALUE_DIM)[None, :, :]
        tl.store(out_head_at + own[:, None, None] * out_token, zeros, mask=empty[:, None, None] & in_head)
    if live == 0:
        return

    k_index = tl.arange(0, BLOCK_K)
    k_mask = k_index < KEY_DIM
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

    log_rate, bias = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
    at = start + token
    decay = decay_of(tl.load(a + at * a_token + head * a_head, mask=in_row, other=0.0).to(tl.float32), log_rate, bias)
    beta = tl.sigmoid(tl.load(b + at * b_token + head * b_head, mask=in_row, other=0.0).to(tl.float32))
    tl.store(decays + (record + token) * V_HEADS + head, decay, mask=in_row)

    o_all = tl.zeros((BLOCK_M, V_BLOCKS, BLOCK_V), tl.float32)
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
            o_all = tl.where(now[:, None, None] & (block == i)[None, :, None], o[None, None, :], o_all)

    in_head = v_all < VALUE_DIM
    inside = in_row[:, None, None] & in_head[None, :, :]
    norm = tl.load(norm_weight + v_all, mask=in_head, other=0.0).to(tl.float32)
    gate = tl.load(
        z + at[:, None, None] * z_token + head * z_head + v_all[None, :, :] * z_v, mask=inside, other=0.0
    ).to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(o_all * o_all, 2), 1) / VALUE_DIM + norm_eps)
    y = o_all * root[:, None, None] * norm[None, :, :] * gate * tl.sigmoid(gate)
    tl.store(out_head_at + at[:, None, None] * out_token, y.to(out.dtype.element_ty), mask=inside)


def gdn_verify_fused(
    mixed_qkv: Tensor,
    z: Tensor,
    gates: Gates,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_state: Tensor,
    ssm_state: Tensor,
    record: DraftRecords,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    out: Tensor,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_verify_fused`; arguments are checked there.

    A program goes through a head's state ``BLOCK_V`` rows at a time, which no other row of it depends on, and through
    all of the row's tokens with each; the outputs stay in registers for the norm.
    """
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    programs = max(rows, cdiv(tokens, max_query_len)) * v_heads
    tile = verify_tile(table_of(ssm_state.device), ssm_state.element_size(), max_query_len, programs)
    block_v = min(tile.rows, next_power_of_2(value_dim))
    _gdn_verify_kernel[(programs,)](
        mixed_qkv,
        z,
        a,
        b,
        conv_weight,
        A_log.contiguous(),
        dt_bias.contiguous(),
        norm_weight.contiguous(),
        conv_state,
        ssm_state,
        *record.tensors(),
        out,
        query_start,
        query_end,
        state_slots,
        rows,
        tokens,
        record.inputs.shape[0],
        record.inputs.shape[1],
        max_query_len,
        key_dim**-0.5,
        norm_eps,
        *mixed_qkv.stride(),
        *z.stride(),
        *a.stride(),
        *b.stride(),
        *conv_weight.stride(),
        *conv_state.stride(),
        *ssm_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        K_HEADS=num_k_heads,
        V_HEADS=v_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        WIDTH=width,
        BLOCK_M=next_power_of_2(max_query_len),
        BLOCK_K=next_power_of_2(key_dim),
        BLOCK_V=block_v,
        V_BLOCKS=next_power_of_2(cdiv(value_dim, block_v)),
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=tile.num_warps,
    )
