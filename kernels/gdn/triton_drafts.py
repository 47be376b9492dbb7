"""What a verification of drafts does around its delta rule, whatever its form: rows, zeros, gates, gated norm."""

import triton
import triton.language as tl

from ..ranges import covered
from .triton_formula import decay_of


@triton.jit
def row_at(place, query_start, query_end, slots, slots_stride, rows, max_query_len):
    """First token, number of tokens and slot of a row, each with 64 bits; no slot (-1) where there is no such row."""
    is_row = place < rows
    start = tl.load(query_start + place, mask=is_row, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=is_row, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=is_row, other=-1).to(tl.int64)
    return start, tl.minimum(end - start, max_query_len), slot


@triton.jit
def zero_tokens_without_row(
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
    VALUE_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """Zeros for those of this program's tokens, `max_query_len` from `place * max_query_len` on, that are in no row.

    Row n has its tokens from n * max_query_len on as a rule; only other tokens have to look for a row.
    """
    first = place * max_query_len
    elsewhere = (start != first) | (length != max_query_len) | (slot < 0)
    if (first < num_tokens) & elsewhere:
        place_of = tl.arange(0, BLOCK_M)
        own = first + place_of
        found = covered(own, query_start, query_end, max_query_len, slots, slots_stride, rows, BLOCK_ROWS)
        empty = (place_of < max_query_len) & (own < num_tokens) & (found == 0)
        v_index = tl.arange(0, BLOCK_D)
        zeros = tl.zeros((BLOCK_M, BLOCK_D), tl.float32).to(out_head_at.dtype.element_ty)
        target = out_head_at + own[:, None] * out_token + v_index[None, :] * out_v
        tl.store(target, zeros, mask=empty[:, None] & (v_index < VALUE_DIM)[None, :])


@triton.jit
def gates_of(a, b, a_token, b_token, A_log, dt_bias, at, in_row):
    """A head's decay and beta of each token, of pointers to the head's."""
    log_rate, bias = tl.load(A_log).to(tl.float32), tl.load(dt_bias).to(tl.float32)
    decay = decay_of(tl.load(a + at * a_token, mask=in_row, other=0.0).to(tl.float32), log_rate, bias)
    beta = tl.sigmoid(tl.load(b + at * b_token, mask=in_row, other=0.0).to(tl.float32))
    return decay, beta


@triton.jit
def store_normed(
    o,
    at,
    in_row,
    z_head_at,
    z_token,
    z_v,
    norm_weight,
    norm_eps,
    out_head_at,
    out_token,
    out_v,
    VALUE_DIM: tl.constexpr,
):
    """The outputs [parts of V, rows of a part, M] of a head, normalised and gated, to where its tokens have them."""
    PARTS: tl.constexpr = o.shape[0]
    BLOCK_V: tl.constexpr = o.shape[1]
    v_index = tl.arange(0, PARTS)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    in_head = v_index < VALUE_DIM
    inside = in_row[None, None, :] & in_head[:, :, None]
    norm = tl.load(norm_weight + v_index, mask=in_head, other=0.0).to(tl.float32)
    gate_at = z_head_at + at[None, None, :] * z_token + v_index[:, :, None] * z_v
    gate = tl.load(gate_at, mask=inside, other=0.0).to(tl.float32)
    root = tl.rsqrt(tl.sum(tl.sum(o * o, 1), 0) / VALUE_DIM + norm_eps)
    y = o * root[None, None, :] * norm[:, :, None] * gate * tl.sigmoid(gate)
    out_at = out_head_at + at[None, None, :] * out_token + v_index[:, :, None] * out_v
    tl.store(out_at, y.to(out_head_at.dtype.element_ty), mask=inside)
