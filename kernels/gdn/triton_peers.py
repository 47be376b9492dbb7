"""What lies between slot-addressed rows and an engine's own prefill function, in Triton: split before, store after.

The functions want q, k (normalised), v, decay and beta as tensors of their own and the states of the rows one behind
the other in float32; they return the final states the same way. Formulas as in :mod:`.reference`.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..ranges import BLOCK_ROWS, covered
from .packed import PackedRows
from .reference import Gates
from .triton_formula import EPSILON, as_stored, softplus

BLOCK_TOKENS = 16
BLOCK_V = 32


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["first", "tokens", "max_query_len", "slots_stride", "num_rows"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots"],
)
def _split_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    q_out,
    k_out,
    v_out,
    decay_out,
    beta_out,
    query_start,
    query_end,
    slots,
    first,
    tokens,
    max_query_len,
    num_rows,
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
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    LOG_DECAY: tl.constexpr,
):
    """A program takes one key head and its value heads for a few tokens. Tokens of skipped rows come out as zeros:
    the convolution leaves them unwritten, and a NaN there would reach the rows beside them.
    """
    t = tl.program_id(0).to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
    k_head = tl.program_id(1)
    inside = t < tokens
    token = first + t
    live = covered(token, query_start, query_end, max_query_len, slots, slots_stride, num_rows, BLOCK_ROWS) > 0
    live = live & inside
    k_index = tl.arange(0, BLOCK_K)
    k_columns = (k_index < KEY_DIM)[None, :]
    q_at = qkv + token[:, None] * qkv_token + (k_head * KEY_DIM + k_index)[None, :] * qkv_column
    q = tl.load(q_at, mask=live[:, None] & k_columns, other=0.0).to(tl.float32)
    k = tl.load(q_at + K_HEADS * KEY_DIM * qkv_column, mask=live[:, None] & k_columns, other=0.0).to(tl.float32)
    q = q / tl.sqrt(tl.sum(q * q, 1) + EPSILON)[:, None]
    k = k / tl.sqrt(tl.sum(k * k, 1) + EPSILON)[:, None]
    to = (t[:, None] * K_HEADS + k_head) * KEY_DIM + k_index[None, :]
    tl.store(q_out + to, q.to(q_out.dtype.element_ty), mask=inside[:, None] & k_columns)
    tl.store(k_out + to, k.to(k_out.dtype.element_ty), mask=inside[:, None] & k_columns)

    v_index = tl.arange(0, BLOCK_V)
    v_columns = (v_index < VALUE_DIM)[None, :]
    GROUP: tl.constexpr = V_HEADS // K_HEADS
    for i in tl.static_range(GROUP):
        head = k_head * GROUP + i
        column = 2 * K_HEADS * KEY_DIM + head * VALUE_DIM + v_index
        v = tl.load(qkv + token[:, None] * qkv_token + column[None, :] * qkv_column, live[:, None] & v_columns, 0.0)
        to = (t[:, None] * V_HEADS + head) * VALUE_DIM + v_index[None, :]
        tl.store(v_out + to, v, mask=inside[:, None] & v_columns)
        rate = -tl.exp(tl.load(A_log + head).to(tl.float32))
        bias = tl.load(dt_bias + head).to(tl.float32)
        g = rate * softplus(tl.load(a + token * a_token + head * a_head, mask=live, other=0.0).to(tl.float32) + bias)
        g = tl.where(live, g, 0.0)
        beta = tl.sigmoid(tl.load(b + token * b_token + head * b_head, mask=live, other=0.0).to(tl.float32))
        tl.store(decay_out + t * V_HEADS + head, g if LOG_DECAY else tl.exp(g), mask=inside)
        tl.store(beta_out + t * V_HEADS + head, tl.where(live, beta, 0.0), mask=inside)


@triton.jit(do_not_specialize=["slots_stride"], do_not_specialize_on_alignment=["slots", "has_initial_state"])
def _collect_kernel(
    state,
    collected,
    slots,
    has_initial_state,
    state_slot,
    state_head,
    state_v,
    state_k,
    slots_stride,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """The state each row starts from, in float32; zeros where it has none or is skipped."""
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = (v_index < VALUE_DIM)[:, None] & (k_index < KEY_DIM)[None, :]
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    at = state + slot * state_slot + head * state_head
    at += v_index[:, None].to(tl.int64) * state_v + k_index[None, :].to(tl.int64) * state_k
    s = tl.zeros((BLOCK_V, BLOCK_K), tl.float32)
    if slot >= 0:
        if tl.load(has_initial_state + row):
            s = tl.load(at, mask=tile, other=0.0).to(tl.float32)
    to = ((row * V_HEADS + head) * VALUE_DIM + v_index[:, None]) * KEY_DIM + k_index[None, :]
    tl.store(collected + to, s, mask=tile)


@triton.jit(
    do_not_specialize=["slots_stride", "grid"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_positions", "snapshot_slots"],
)
def _put_back_kernel(
    final,
    checkpoints,
    checkpoint_offsets,
    state,
    query_start,
    query_end,
    slots,
    snapshot_positions,
    snapshot_slots,
    state_slot,
    state_head,
    state_v,
    state_k,
    slots_stride,
    grid,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    """Final states to the rows' slots, and what is to be kept besides, from the states on the grid, to its slots."""
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    length = tl.load(query_end + row).to(tl.int64) - tl.load(query_start + row).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    if (slot < 0) | (length <= 0):
        return
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    tile = (v_index < VALUE_DIM)[:, None] & (k_index < KEY_DIM)[None, :]
    within = (head * VALUE_DIM + v_index[:, None]).to(tl.int64) * KEY_DIM + k_index[None, :]
    one = V_HEADS * VALUE_DIM * KEY_DIM
    at = state + head * state_head
    at += v_index[:, None].to(tl.int64) * state_v + k_index[None, :].to(tl.int64) * state_k
    s = tl.load(final + row * one + within, mask=tile, other=0.0).to(tl.float32)
    tl.store(at + slot * state_slot, as_stored(s, state), mask=tile)
    if HAS_SNAPSHOT:
        target = tl.load(snapshot_slots + row).to(tl.int64)
        position = tl.load(snapshot_positions + row).to(tl.int64)
        if (target >= 0) & (position > 0) & (position <= length):
            on_grid = position % grid == 0
            if on_grid | (position == length):
                if position < length:
                    place = tl.load(checkpoint_offsets + row).to(tl.int64) + position // grid - 1
                    s = tl.load(checkpoints + place * one + within, mask=tile, other=0.0).to(tl.float32)
                tl.store(at + target * state_slot, as_stored(s, state), mask=tile)


def split(
    mixed_qkv: Tensor,
    gates: Gates,
    num_k_heads: int,
    head_dims: tuple[int, int],
    packed: PackedRows,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    log_decay: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """q, k ``[T, HK, K]`` (normalised, unscaled), v ``[T, HV, V]`` in the tokens' dtype, and ``[T, HV]`` float32 decay
    and beta, contiguous, T the packed rows' tokens. head_dims is (K, V); decay is g with ``log_decay``, else exp(g).
    """
    a, b, A_log, dt_bias = gates
    key_dim, value_dim = head_dims
    v_heads, tokens = A_log.shape[0], packed.tokens
    q, k = (mixed_qkv.new_empty(tokens, num_k_heads, key_dim) for _ in range(2))
    v = mixed_qkv.new_empty(tokens, v_heads, value_dim)
    decay, beta = (torch.empty(tokens, v_heads, dtype=torch.float32, device=mixed_qkv.device) for _ in range(2))
    _split_kernel[(triton.cdiv(tokens, BLOCK_TOKENS), num_k_heads)](
        mixed_qkv,
        a,
        b,
        A_log.contiguous(),
        dt_bias.contiguous(),
        q,
        k,
        v,
        decay,
        beta,
        query_start,
        query_end,
        state_slots,
        packed.first,
        tokens,
        max_query_len,
        query_start.shape[0],
        *mixed_qkv.stride(),
        *a.stride(),
        *b.stride(),
        state_slots.stride(0),
        K_HEADS=num_k_heads,
        V_HEADS=v_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_K=triton.next_power_of_2(key_dim),
        BLOCK_V=triton.next_power_of_2(value_dim),
        BLOCK_TOKENS=BLOCK_TOKENS,
        BLOCK_ROWS=BLOCK_ROWS,
        LOG_DECAY=log_decay,
    )
    return q, k, v, decay, beta


def collect(ssm_state: Tensor, state_slots: Tensor, has_initial_state: Tensor) -> Tensor:
    """The rows' initial states ``[N, HV, V, K]`` in float32, contiguous; zeros for rows without, and skipped ones."""
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows = state_slots.shape[0]
    collected = torch.empty(rows, v_heads, value_dim, key_dim, dtype=torch.float32, device=ssm_state.device)
    _collect_kernel[(rows * v_heads, triton.cdiv(value_dim, BLOCK_V))](
        ssm_state,
        collected,
        state_slots,
        has_initial_state,
        *ssm_state.stride(),
        state_slots.stride(0),
        **_tiles(ssm_state),
    )
    return collected


def put_back(
    final: Tensor,
    checkpoints: Tensor | None,
    packed: PackedRows,
    ssm_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """Write final states ``[N, HV, V, K]``, and snapshots if any, into their slots; skipped rows write nothing.

    ``checkpoints [packed.checkpoints, HV, V, K]``: the state after every ``packed.snapshot_grid`` tokens of each row,
    row after row; needed with ``snapshot`` (positions and slots, as for a prefill).
    """
    _, v_heads, value_dim, _ = ssm_state.shape
    positions, targets = snapshot or (query_start, query_start)
    _put_back_kernel[(final.shape[0] * v_heads, triton.cdiv(value_dim, BLOCK_V))](
        final,
        final if checkpoints is None else checkpoints,
        packed.cu_seqlens if checkpoints is None else packed.checkpoint_offsets,
        ssm_state,
        query_start,
        query_end,
        state_slots,
        positions,
        targets,
        *ssm_state.stride(),
        state_slots.stride(0),
        packed.snapshot_grid,
        HAS_SNAPSHOT=snapshot is not None,
        **_tiles(ssm_state),
    )


def _tiles(ssm_state: Tensor) -> dict[str, int]:
    _, v_heads, value_dim, key_dim = ssm_state.shape
    return {
        "V_HEADS": v_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_K": triton.next_power_of_2(key_dim),
        "BLOCK_V": BLOCK_V,
    }
