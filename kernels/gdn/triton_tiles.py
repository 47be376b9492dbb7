"""The kernels of :mod:`.triton_tiled` that treat all chunks at once.

A chunk of a row has a number, counted over all rows, and each head of it a tile of its own in every workspace. So what
is read back needs neither masks nor strides, and tokens past a row's end are copies of its last one that write nothing.
"""

import triton
import triton.language as tl

from ..ranges import locate_chunk
from .triton_formula import EPSILON, softplus
from .triton_inverse import unit_lower_inverse_by_merging

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit(
    do_not_specialize=["num_rows", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots"],
)
def gates_kernel(
    a,
    b,
    A_log,
    dt_bias,
    places,
    first_numbers,
    decays_out,
    strengths_out,
    query_start,
    query_end,
    slots,
    num_rows,
    a_token,
    a_head,
    b_token,
    b_head,
    slots_stride,
    V_HEADS: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
):
    """What the other kernels ask of each chunk, once.

    places [chunks, 2]: its first token and how many it has, none of numbers that no row needs; first_numbers [rows]: of
    a row's first chunk; decays_out and strengths_out [chunks, HV, CHUNK]: the running sum of log2 of the decay, and the
    write strength, zero past the end.
    """
    number = tl.program_id(0)
    row, chunk = locate_chunk(number, query_start, query_end, slots, slots_stride, num_rows, CHUNK, BLOCK_ROWS)
    if row < 0:
        tl.store(places + 2 * number + 1, 0)
        return
    end = tl.load(query_end + row).to(tl.int64)
    begin = tl.load(query_start + row).to(tl.int64) + chunk * CHUNK
    count = tl.minimum(end - begin, CHUNK)
    tl.store(places + 2 * number, begin)
    tl.store(places + 2 * number + 1, count)
    if chunk == 0:
        tl.store(first_numbers + row, number)
    head = tl.arange(0, BLOCK_HEADS)
    c = tl.arange(0, CHUNK)
    token = begin + c
    valid = (c < count)[:, None] & (head < V_HEADS)[None, :]
    rate = -LOG2_E * tl.exp(tl.load(A_log + head, mask=head < V_HEADS, other=0.0).to(tl.float32))
    bias = tl.load(dt_bias + head, mask=head < V_HEADS, other=0.0).to(tl.float32)
    g = tl.load(a + token[:, None] * a_token + head[None, :] * a_head, mask=valid, other=0.0).to(tl.float32)
    g = tl.where(valid, rate[None, :] * softplus(g + bias[None, :]), 0.0)
    beta = tl.load(b + token[:, None] * b_token + head[None, :] * b_head, mask=valid, other=0.0).to(tl.float32)
    at = (number.to(tl.int64) * V_HEADS + head[None, :]) * CHUNK + c[:, None]
    in_head = (head < V_HEADS)[None, :] & (c < CHUNK)[:, None]
    tl.store(decays_out + at, tl.cumsum(g, 0), mask=in_head)
    tl.store(strengths_out + at, tl.where(valid, tl.sigmoid(beta), 0.0), mask=in_head)


@triton.jit
def chunk_kernel(
    qkv,
    places,
    decays,
    strengths,
    W_out,
    U_out,
    P_out,
    q_scales,
    k_scales,
    carries,
    scale,
    qkv_token,
    qkv_column,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
):
    """One value head of a chunk: W, U and P of :mod:`.triton_prefill`. All heads of a chunk run side by side."""
    number = tl.program_id(0) // V_HEADS
    head = tl.program_id(0) % V_HEADS
    begin = tl.load(places + 2 * number)
    count = tl.load(places + 2 * number + 1)
    if count == 0:
        return
    k_head = head // (V_HEADS // K_HEADS)
    c = tl.arange(0, CHUNK)
    token = begin + tl.minimum(c, count - 1)
    k_index = tl.arange(0, KEY_DIM)
    v_index = tl.arange(0, VALUE_DIM)
    tile = number.to(tl.int64) * V_HEADS + head
    # All loads first, so that they are under way together.
    k_at = qkv + token[:, None] * qkv_token + ((K_HEADS + k_head) * KEY_DIM + k_index)[None, :] * qkv_column
    first_v = 2 * K_HEADS * KEY_DIM + head * VALUE_DIM
    k = tl.load(k_at).to(DOT)
    q = tl.load(k_at - K_HEADS * KEY_DIM * qkv_column).to(DOT)
    v = tl.load(qkv + token[:, None] * qkv_token + (first_v + v_index)[None, :] * qkv_column).to(DOT)
    G = tl.load(decays + tile * CHUNK + c)
    beta = tl.load(strengths + tile * CHUNK + c)
    q_wide = q.to(tl.float32)
    q_norm = scale / tl.sqrt(tl.sum(q_wide * q_wide, 1) + EPSILON)
    QK = tl.dot(q, tl.trans(k))
    KK = tl.dot(k, tl.trans(k))
    # The diagonal of k k^T has the squares that a norm would sum anew.
    k_norm = 1.0 / tl.sqrt(tl.sum(tl.where(c[:, None] == c[None, :], KK, 0.0), 1) + EPSILON)
    G_last = tl.min(G, 0)  # g is never positive, and padding adds nothing
    into = tl.exp2(G)
    tl.store(q_scales + tile * CHUNK + c, q_norm * into)
    tl.store(k_scales + tile * CHUNK + c, k_norm * tl.exp2(G_last - G))
    tl.store(carries + tile, tl.exp2(G_last))
    decay = tl.exp2(tl.minimum(G[:, None] - G[None, :], 0.0)) * k_norm[None, :]  # above the diagonal 1
    P = tl.where(c[:, None] >= c[None, :], QK * decay * q_norm[:, None], 0.0)
    tl.store(P_out + tile * (CHUNK * CHUNK) + c[:, None] * CHUNK + c[None, :], P.to(DOT))
    T = unit_lower_inverse_by_merging(KK * decay * (beta * k_norm)[:, None], CHUNK)
    # Scaling T's columns rather than rows of k and v leaves those as they lie in shared memory.
    U = tl.dot((T * beta[None, :]).to(DOT), v)
    tl.store(U_out + tile * (CHUNK * VALUE_DIM) + c[:, None] * VALUE_DIM + v_index[None, :], U.to(DOT))
    # Of keys that repeat, a row of W is what is left of nearly equal multiples of one key, and an error of it meets the
    # whole state. So what rounding takes from the factors is multiplied, too; first, since its registers are free then.
    factors = T * (beta * k_norm * into)[None, :]
    rounded = factors.to(DOT)
    W = tl.dot((factors - rounded.to(tl.float32)).to(DOT), k)
    W = tl.dot(rounded, k, W)
    tl.store(W_out + tile * (CHUNK * KEY_DIM) + c[:, None] * KEY_DIM + k_index[None, :], W.to(DOT))
