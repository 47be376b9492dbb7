"""Chunked prefill in Triton, in two kernels; where a GPU's table says "merging", :mod:`.triton_tiled` has three.

The first treats all chunks at once: gates and their running sum, the inverse of the chunk's triangular system, and from
it what the chunk writes (U), what of the state it replaces (W) and how its tokens see each other (P). The second walks
the chunks of one row and head with the state in registers. Notation and formula as in
:func:`.reference.delta_rule_chunked`. q and k enter the matrix products as they come, and their norms scale rows of the
results, so normalising rounds nothing.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS, locate_chunk, max_chunks
from . import triton_tiled
from .config import own_prefill, table_of
from .reference import SNAPSHOT_GRID, Gates
from .table import MERGING, OwnPrefill
from .triton_formula import EPSILON, as_stored, softplus
from .triton_inverse import unit_lower_inverse, unit_lower_inverse_by_blocks

CHUNK = SNAPSHOT_GRID  # a state can be kept where a chunk ends
# Columns of the state that a program of the second kernel holds. Triton 3.6 compiles bfloat16 products of fewer than 64
# columns to wrong code for Hopper (seen on an H200 with K = V = 64 and 128, and with 16 in the first kernel: garbage or
# an illegal access), as soon as an operand comes from registers rather than by an asynchronous copy.
BLOCK_V_NARROW = 64
BLOCK_V_WIDE = 32


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots"],
)
def _chunk_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    W_out,
    U_out,
    P_out,
    q_scales,
    k_scales,
    carries,
    query_start,
    query_end,
    slots,
    num_rows,
    scale,
    qkv_token,
    qkv_column,
    a_token,
    a_head,
    b_token,
    b_head,
    slots_stride,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    INVERSE_PRECISION: tl.constexpr,
    BY_BLOCKS: tl.constexpr,
):
    row, chunk = locate_chunk(
        tl.program_id(0), query_start, query_end, slots, slots_stride, num_rows, CHUNK, BLOCK_ROWS
    )
    if row < 0:
        return
    head = tl.program_id(1)
    k_head = head // (V_HEADS // K_HEADS)
    end = tl.load(query_end + row).to(tl.int64)
    c = tl.arange(0, CHUNK)
    token = tl.load(query_start + row).to(tl.int64) + chunk * CHUNK + c
    valid = token < end
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.arange(0, BLOCK_V)
    k_tile = valid[:, None] & (k_index < KEY_DIM)[None, :]
    v_tile = valid[:, None] & (v_index < VALUE_DIM)[None, :]

    rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
    bias = tl.load(dt_bias + head).to(tl.float32)
    g = rate * softplus(tl.load(a + token * a_token + head * a_head, mask=valid, other=0.0).to(tl.float32) + bias)
    beta = tl.sigmoid(tl.load(b + token * b_token + head * b_head, mask=valid, other=0.0).to(tl.float32))
    beta = tl.where(valid, beta, 0.0)
    G = tl.cumsum(tl.where(valid, g, 0.0), 0)
    G_last = tl.min(G, 0)  # g is never positive, and padding adds nothing

    q_at = qkv + token[:, None] * qkv_token + (k_head * KEY_DIM + k_index)[None, :] * qkv_column
    k_at = q_at + K_HEADS * KEY_DIM * qkv_column
    q = tl.load(q_at, mask=k_tile, other=0.0).to(DOT)
    k = tl.load(k_at, mask=k_tile, other=0.0).to(DOT)
    q_wide = q.to(tl.float32)
    k_wide = k.to(tl.float32)
    q_norm = scale / tl.sqrt(tl.sum(q_wide * q_wide, 1) + EPSILON)
    k_norm = 1.0 / tl.sqrt(tl.sum(k_wide * k_wide, 1) + EPSILON)
    at = token * V_HEADS + head  # workspaces are [T, HV, ...], contiguous
    tl.store(q_scales + at, q_norm * tl.exp(G), mask=valid)
    tl.store(k_scales + at, k_norm * tl.exp(G_last - G), mask=valid)
    tl.store(carries + tl.min(at, 0), tl.exp(G_last))

    below = c[:, None] > c[None, :]
    lower = c[:, None] >= c[None, :]
    decay = tl.exp(tl.where(below, G[:, None] - G[None, :], 0.0)) * k_norm[None, :]
    P = tl.dot(q, tl.trans(k), input_precision=PRECISION) * decay * q_norm[:, None]
    tl.store(P_out + at[:, None] * CHUNK + c[None, :], tl.where(lower, P, 0.0).to(DOT), mask=valid[:, None])
    A = tl.dot(k, tl.trans(k), input_precision=PRECISION) * decay * (beta * k_norm)[:, None]
    A = tl.where(below, A, 0.0)
    if BY_BLOCKS:
        T = unit_lower_inverse_by_blocks(A, CHUNK, INVERSE_PRECISION).to(DOT)
    else:
        T = unit_lower_inverse(A, CHUNK, INVERSE_PRECISION).to(DOT)

    k_wide = tl.load(k_at, mask=k_tile, other=0.0).to(tl.float32)  # again: held across the inverse it would spill
    W = tl.dot(T, (k_wide * (beta * k_norm * tl.exp(G))[:, None]).to(DOT), input_precision=PRECISION)
    tl.store(W_out + at[:, None] * KEY_DIM + k_index[None, :], W.to(DOT), mask=k_tile)
    v_at = qkv + token[:, None] * qkv_token + (2 * K_HEADS * KEY_DIM + head * VALUE_DIM + v_index)[None, :] * qkv_column
    v = tl.load(v_at, mask=v_tile, other=0.0).to(tl.float32)
    U = tl.dot(T, (v * beta[:, None]).to(DOT), input_precision=PRECISION)
    tl.store(U_out + at[:, None] * VALUE_DIM + v_index[None, :], U.to(DOT), mask=v_tile)


@triton.jit(
    do_not_specialize=["slots_stride"],
    do_not_specialize_on_alignment=[
        "query_start",
        "query_end",
        "slots",
        "has_initial_state",
        "snapshot_positions",
        "snapshot_slots",
    ],
)
def _walk_kernel(
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
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    CHUNK: tl.constexpr,
    DOT: tl.constexpr,
    PRECISION: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    k_head = head // (V_HEADS // K_HEADS)
    start = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_end + row).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (end <= start):
        return
    c = tl.arange(0, CHUNK)
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_mask = k_index < KEY_DIM
    v_mask = v_index < VALUE_DIM

    # Held transposed, [K, V]: every product then has the chunk or K as its tall side.
    tile = k_mask[:, None] & v_mask[None, :]
    state_at = state + slot * state_slot + head * state_head
    state_at += k_index[:, None].to(tl.int64) * state_k + v_index[None, :].to(tl.int64) * state_v
    s = tl.zeros((BLOCK_K, BLOCK_V), tl.float32)
    if tl.load(has_initial_state + row):
        s = tl.load(state_at, mask=tile, other=0.0).to(tl.float32)
    tl.debug_barrier()  # of a small head one element is held by several threads: all have read before one writes

    if HAS_SNAPSHOT:
        snapshot = tl.load(snapshot_slots + row).to(tl.int64)
        snapshot_end = start + tl.load(snapshot_positions + row).to(tl.int64)
        snapshot_end = tl.where(snapshot >= 0, snapshot_end, -1)  # no chunk ends there
        snapshot_at = state_at + (snapshot - slot) * state_slot

    for first in range(start, end, CHUNK):
        token = first + c
        valid = token < end
        at = token * V_HEADS + head
        k_tile = valid[:, None] & k_mask[None, :]
        v_tile = valid[:, None] & v_mask[None, :]
        q_at = qkv + token[:, None] * qkv_token + (k_head * KEY_DIM + k_index)[None, :] * qkv_column
        q = tl.load(q_at, mask=k_tile, other=0.0).to(DOT)
        k = tl.load(q_at + K_HEADS * KEY_DIM * qkv_column, mask=k_tile, other=0.0).to(DOT)
        W = tl.load(W_in + at[:, None] * KEY_DIM + k_index[None, :], mask=k_tile, other=0.0)
        U = tl.load(U_in + at[:, None] * VALUE_DIM + v_index[None, :], mask=v_tile, other=0.0)
        P = tl.load(P_in + at[:, None] * CHUNK + c[None, :], mask=valid[:, None], other=0.0)
        q_scale = tl.load(q_scales + at, mask=valid, other=0.0)
        k_scale = tl.load(k_scales + at, mask=valid, other=0.0)
        carried = tl.load(carries + first * V_HEADS + head)

        s_dot = s.to(DOT)
        written = U.to(tl.float32) - tl.dot(W, s_dot, input_precision=PRECISION)
        o = tl.dot(q, s_dot, input_precision=PRECISION) * q_scale[:, None]
        o += tl.dot(P, written.to(DOT), input_precision=PRECISION)
        out_at = out + token[:, None] * out_token + head * out_head + v_index[None, :] * out_v
        tl.store(out_at, o.to(out.dtype.element_ty), mask=v_tile)
        s = s * carried + tl.dot(tl.trans(k), (written * k_scale[:, None]).to(DOT), input_precision=PRECISION)
        if HAS_SNAPSHOT:
            rows_kept = tl.where(tl.minimum(first + CHUNK, end) == snapshot_end, KEY_DIM, 0)
            kept_tile = (k_index < rows_kept)[:, None] & v_mask[None, :]
            tl.store(snapshot_at, as_stored(s, state), mask=kept_tile)

    tl.store(state_at, as_stored(s, state), mask=tile)


def gdn_prefill(
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_prefill`; arguments are checked there.

    Matrix products take bfloat16 on a GPU for bfloat16 tokens of heads in whole tiles of 64, else float32 (as TF32
    for float16, which it holds exactly; split in three for the others).
    """
    a, b, A_log, dt_bias = gates
    tokens = mixed_qkv.shape[0]
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows = query_start.shape[0]
    built = own_prefill(table_of(mixed_qkv.device), tokens, rows)
    if built.inverse == MERGING:
        if triton_tiled.can_take(mixed_qkv, key_dim, value_dim):
            ranges = (query_start, query_end, max_query_len, state_slots, has_initial_state)
            triton_tiled.gdn_prefill(mixed_qkv, gates, ssm_state, num_k_heads, *ranges, out, snapshot, built)
            return
        built = OwnPrefill()
    whole_tiles = key_dim % BLOCK_V_NARROW == 0 and value_dim % BLOCK_V_NARROW == 0
    narrow = mixed_qkv.is_cuda and mixed_qkv.dtype == torch.bfloat16 and whole_tiles
    dot = torch.bfloat16 if narrow else torch.float32
    by_blocks = built.inverse == "blocks"
    # Without a Newton step at its end the inverse is only as good as its products.
    wide_inverse = mixed_qkv.dtype == torch.float32 or (by_blocks and not narrow)

    def workspace(*shape: int, dtype: torch.dtype = dot) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=mixed_qkv.device)

    W = workspace(tokens, v_heads, key_dim)
    U = workspace(tokens, v_heads, value_dim)
    P = workspace(tokens, v_heads, CHUNK)
    scales = [workspace(tokens, v_heads, dtype=torch.float32) for _ in range(3)]
    block_k = max(16, next_power_of_2(key_dim))
    block_v = max(16, next_power_of_2(value_dim))
    shared = {
        "K_HEADS": num_k_heads,
        "V_HEADS": v_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": block_k,
        "CHUNK": CHUNK,
        "DOT": tl.bfloat16 if narrow else tl.float32,
        "PRECISION": "tf32" if mixed_qkv.dtype == torch.float16 else "tf32x3",
    }
    _chunk_kernel[(max_chunks(tokens, rows, CHUNK, max_query_len), v_heads)](
        mixed_qkv,
        a,
        b,
        A_log.contiguous(),
        dt_bias.contiguous(),
        W,
        U,
        P,
        *scales,
        query_start,
        query_end,
        state_slots,
        rows,
        key_dim**-0.5,
        *mixed_qkv.stride(),
        *a.stride(),
        *b.stride(),
        state_slots.stride(0),
        BLOCK_V=block_v,
        BLOCK_ROWS=BLOCK_ROWS,
        INVERSE_PRECISION="tf32x3" if wide_inverse else "tf32",
        BY_BLOCKS=by_blocks,
        num_warps=built.chunk_warps,
        maxnreg=built.chunk_registers,
        num_stages=1,
        **shared,
    )
    walk_v = BLOCK_V_NARROW if narrow else min(BLOCK_V_WIDE, block_v)
    _walk_kernel[(rows * v_heads, cdiv(value_dim, walk_v))](
        mixed_qkv,
        W,
        U,
        P,
        *scales,
        ssm_state,
        out,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        *(snapshot or (query_start, query_start)),
        *mixed_qkv.stride(),
        *ssm_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        BLOCK_V=walk_v,
        HAS_SNAPSHOT=snapshot is not None,
        num_warps=4,
        num_stages=built.walk_stages if narrow and block_k <= 128 else 1,
        **shared,
    )
