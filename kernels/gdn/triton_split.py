"""What an engine's own prefill function is given, in one launch: the convolution of every row, q and k normalised, q, k
and v each a tensor of its own, the decay and the write strength. Formulas as in :mod:`.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..conv.triton_prefill import earlier, tap
from ..conv.triton_windows import move_windows
from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS, locate_chunk, max_chunks
from .convolution import Convolution
from .packed import PackedRows
from .reference import Gates
from .triton_formula import EPSILON, softplus

CHUNK = 32  # tokens of a row that a program takes one after the other
PER_THREAD = 8  # channels
MOST_THREADS = 128


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["first", "tokens", "num_rows", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "has_initial_state"],
)
def _split_kernel(
    x,
    weight,
    windows,
    a,
    b,
    A_log,
    dt_bias,
    qkv_out,
    decay_out,
    beta_out,
    query_start,
    query_end,
    slots,
    has_initial_state,
    first,
    tokens,
    num_rows,
    x_token,
    x_column,
    weight_channel,
    weight_tap,
    window_slot,
    window_channel,
    window_column,
    a_token,
    a_head,
    b_token,
    b_head,
    slots_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    HEADS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LOG_DECAY: tl.constexpr,
):
    """A program takes HEADS heads of q, of k or of v through CHUNK tokens. WIDTH 0: x is convolved already.

    Each input is loaded once, while the two before it are worked on. Tokens of skipped rows come out as zeros: a NaN
    there would reach the rows beside them.
    """
    # Skipped rows have chunks too, so it is not told of slots.
    row, chunk = locate_chunk(tl.program_id(0), query_start, query_end, query_start, 1, num_rows, CHUNK, BLOCK_ROWS)
    if row < 0:
        return
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.load(query_end + row).to(tl.int64) - start
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    begin = chunk * CHUNK
    token = start + begin - first  # among the packed rows
    count = tl.minimum(tl.minimum(length - begin, CHUNK), tokens - token).to(tl.int32)

    K_BLOCKS: tl.constexpr = (K_HEADS + HEADS - 1) // HEADS
    part = tl.minimum(tl.program_id(1) // K_BLOCKS, 2)  # q, k, v
    heads = (tl.program_id(1) - part * K_BLOCKS) * HEADS + tl.arange(0, HEADS)
    num_heads = tl.where(part < 2, K_HEADS, V_HEADS)
    d = tl.arange(0, BLOCK_DIM)
    here = (heads < num_heads)[:, None] & (d < DIM)[None, :]
    read = tl.where(slot >= 0, count, 0) * here.to(tl.int32)  # tokens to read, lane by lane
    channels = (part * K_HEADS + heads[:, None]) * DIM + d[None, :]
    at = x + (start + begin) * x_token + channels * x_column
    # The three outputs lie one behind the other.
    to = qkv_out + part * tokens.to(tl.int64) * (K_HEADS * DIM)
    to += (token * num_heads + heads[:, None]) * DIM + d[None, :]

    if WIDTH > 0:
        window = windows + slot * window_slot + channels.to(tl.int64) * window_channel
        number = tl.where(read > 0, begin, -1)
        history = tl.where(tl.load(has_initial_state + row) != 0, number, -1)
        w = weight + channels * weight_channel
        w0 = tap(w, weight_tap, 0, here, WIDTH)
        w1 = tap(w, weight_tap, 1, here, WIDTH)
        w2 = tap(w, weight_tap, 2, here, WIDTH)
        w3 = tap(w, weight_tap, 3, here, WIDTH)
        x1 = earlier(at, window, 1, number, history, x_token, window_column, WIDTH)
        x2 = earlier(at, window, 2, number, history, x_token, window_column, WIDTH)
        x3 = earlier(at, window, 3, number, history, x_token, window_column, WIDTH)
    new = tl.load(at, mask=read > 0, other=0.0)
    then = tl.load(at + x_token, mask=read > 1, other=0.0)
    for i in range(count):
        coming = tl.load(at + (i + 2) * x_token, mask=i + 2 < read, other=0.0)
        y = new.to(tl.float32)
        if WIDTH > 0:
            x0 = y
            y = w0 * x0 + w1 * x1 + w2 * x2 + w3 * x3
            y = y * tl.sigmoid(y)
            x3, x2, x1 = x2, x1, x0
        if part < 2:
            y = y / tl.sqrt(tl.sum(y * y, 1) + EPSILON)[:, None]
        tl.store(to + i * num_heads * DIM, y.to(qkv_out.dtype.element_ty), mask=here)
        new, then = then, coming

    if part == 2:
        t = tl.arange(0, CHUNK)
        each = (t < count)[:, None] & (heads < V_HEADS)[None, :]
        live = (t < tl.where(slot >= 0, count, 0))[:, None] & (heads < V_HEADS)[None, :]
        rate = -tl.exp(tl.load(A_log + heads, mask=heads < V_HEADS, other=0.0).to(tl.float32))
        bias = tl.load(dt_bias + heads, mask=heads < V_HEADS, other=0.0).to(tl.float32)
        row_of = (start + begin + t)[:, None]
        g = tl.load(a + row_of * a_token + heads[None, :] * a_head, mask=live, other=0.0).to(tl.float32)
        g = tl.where(live, rate[None, :] * softplus(g + bias[None, :]), 0.0)
        beta = tl.load(b + row_of * b_token + heads[None, :] * b_head, mask=live, other=0.0).to(tl.float32)
        gates_to = (token + t)[:, None] * V_HEADS + heads[None, :]
        tl.store(decay_out + gates_to, g if LOG_DECAY else tl.exp(g), mask=each)
        tl.store(beta_out + gates_to, tl.where(live, tl.sigmoid(beta), 0.0), mask=each)


def split(
    mixed_qkv: Tensor,
    convolution: Convolution | None,
    gates: Gates,
    num_k_heads: int,
    head_dim: int,
    packed: PackedRows,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    log_decay: bool,
    snapshot: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k ``[T, HK, D]`` (normalised, unscaled), v ``[T, HV, D]`` in the tokens' dtype, and ``[T, HV]`` float32 decay
    and beta, contiguous, T the packed rows' tokens; decay is g with ``log_decay``, else exp(g).

    With ``convolution`` (W at most `FUSED_WIDTH`) mixed_qkv holds its inputs, and the rows' windows are moved in its
    state, snapshots of them kept as a prefill keeps them.
    """
    a, b, A_log, dt_bias = gates
    v_heads, tokens, rows = A_log.shape[0], packed.tokens, query_start.shape[0]
    sizes = [tokens * num_k_heads * head_dim] * 2 + [tokens * v_heads * head_dim]
    qkv = mixed_qkv.new_empty(sum(sizes))
    decay, beta = (torch.empty(tokens, v_heads, dtype=torch.float32, device=mixed_qkv.device) for _ in range(2))
    block_dim = next_power_of_2(head_dim)
    heads = min(max(1, MOST_THREADS * PER_THREAD // block_dim), next_power_of_2(num_k_heads))
    blocks = 2 * cdiv(num_k_heads, heads) + cdiv(v_heads, heads)
    width = 0 if convolution is None else convolution.width
    weight, windows = (mixed_qkv, mixed_qkv) if convolution is None else (convolution.weight, convolution.state)
    window_strides = (0, 0, 0) if convolution is None else windows.stride()
    _split_kernel[(max_chunks(tokens, rows, CHUNK), blocks)](
        mixed_qkv,
        weight,
        windows,
        a,
        b,
        A_log.contiguous(),
        dt_bias.contiguous(),
        qkv,
        decay,
        beta,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        packed.first,
        tokens,
        rows,
        *mixed_qkv.stride(),
        *weight.stride(),
        *window_strides,
        *a.stride(),
        *b.stride(),
        state_slots.stride(0),
        K_HEADS=num_k_heads,
        V_HEADS=v_heads,
        DIM=head_dim,
        WIDTH=width,
        HEADS=heads,
        CHUNK=CHUNK,
        BLOCK_DIM=block_dim,
        BLOCK_ROWS=BLOCK_ROWS,
        LOG_DECAY=log_decay,
        num_warps=max(1, heads * block_dim // (32 * PER_THREAD)),
    )
    if convolution is not None:
        ranges = (query_start, query_end, state_slots, has_initial_state)
        move_windows(mixed_qkv, width, windows, *ranges, snapshot)
    q, k, v = qkv.split(sizes)
    k_shape = (tokens, num_k_heads, head_dim)
    return q.view(k_shape), k.view(k_shape), v.view(tokens, v_heads, head_dim), decay, beta
