"""Decode and verify in Triton: one recurrent kernel over one or a few tokens a row."""

import triton
import triton.language as tl
from torch import Tensor

from ..integers import cdiv, next_power_of_2
from .reference import Gates
from .triton_formula import EPSILON, advance, as_stored, decay_of


@triton.jit
def load_normalized(pointer, stride, index, mask):
    """One head's q or k of one token, divided by sqrt(sum of squares + 1e-6), in float32."""
    x = tl.load(pointer + index * stride, mask=mask, other=0.0).to(tl.float32)
    return x / tl.sqrt(tl.sum(x * x, 0) + EPSILON)


# Unspecialised, decode and verify are one binary: one compilation, and outputs equal to the bit.
@triton.jit(
    do_not_specialize=["max_query_len", "initial_slots_stride", "output_slots_row", "output_slots_token"],
    do_not_specialize_on_alignment=["query_start", "query_end", "initial_slots", "output_slots", "snapshot_slots"],
)
def _recurrent_kernel(
    qkv,
    a,
    b,
    A_log,
    dt_bias,
    state,
    out,
    query_start,
    query_end,
    initial_slots,
    output_slots,
    snapshot_slots,
    max_query_len,
    scale,
    qkv_token,
    qkv_column,
    a_token,
    a_head,
    b_token,
    b_head,
    state_slot,
    state_head,
    state_v,
    state_k,
    out_token,
    out_head,
    out_v,
    initial_slots_stride,
    output_slots_row,
    output_slots_token,
    K_HEADS: tl.constexpr,
    V_HEADS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):
    row = (tl.program_id(0) // V_HEADS).to(tl.int64)
    head = tl.program_id(0) % V_HEADS
    start = tl.load(query_start + row).to(tl.int64)
    length = tl.minimum(tl.load(query_end + row).to(tl.int64) - start, max_query_len).to(tl.int32)
    slot = tl.load(initial_slots + row * initial_slots_stride).to(tl.int64)
    if (slot < 0) | (length <= 0):
        return
    k_index = tl.arange(0, BLOCK_K)
    v_index = tl.program_id(1) * BLOCK_V + tl.arange(0, BLOCK_V)
    k_mask = k_index < KEY_DIM
    v_mask = v_index < VALUE_DIM
    tile = v_mask[:, None] & k_mask[None, :]
    k_head = head // (V_HEADS // K_HEADS)
    q_columns = qkv + k_head * KEY_DIM * qkv_column
    k_columns = q_columns + K_HEADS * KEY_DIM * qkv_column
    v_columns = qkv + (2 * K_HEADS * KEY_DIM + head * VALUE_DIM) * qkv_column

    state_tile = state + head * state_head + v_index[:, None] * state_v + k_index[None, :] * state_k
    s = tl.load(state_tile + slot * state_slot, mask=tile, other=0.0).to(tl.float32)
    tl.debug_barrier()  # of a small head one element is held by several threads: all have read before one writes
    log_rate = tl.load(A_log + head).to(tl.float32)
    bias = tl.load(dt_bias + head).to(tl.float32)

    for j in range(length):
        token = start + j
        q = load_normalized(q_columns + token * qkv_token, qkv_column, k_index, k_mask) * scale
        k = load_normalized(k_columns + token * qkv_token, qkv_column, k_index, k_mask)
        v = tl.load(v_columns + token * qkv_token + v_index * qkv_column, mask=v_mask, other=0.0).to(tl.float32)
        decay = decay_of(tl.load(a + token * a_token + head * a_head).to(tl.float32), log_rate, bias)
        beta = tl.sigmoid(tl.load(b + token * b_token + head * b_head).to(tl.float32))
        s, _, o = advance(s, q, k, v, decay, beta)
        tl.store(out + token * out_token + head * out_head + v_index * out_v, o.to(out.dtype.element_ty), mask=v_mask)
        target = tl.load(output_slots + row * output_slots_row + j * output_slots_token).to(tl.int64)
        if target >= 0:
            tl.store(state_tile + target * state_slot, as_stored(s, state), mask=tile)
    if HAS_SNAPSHOT:
        snapshot = tl.load(snapshot_slots + row).to(tl.int64)
        if snapshot >= 0:
            tl.store(state_tile + snapshot * state_slot, as_stored(s, state), mask=tile)


def gdn_recurrent(
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    initial_slots: Tensor,
    output_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None,
) -> None:
    """Decode and verify: see :func:`qwen3next_plugin.kernels.gdn.gdn_verify`; arguments are checked there.

    A program holds ``BLOCK_V`` rows of one head's state in registers from its only read to its last write, so a slot
    may be both where a row starts and where it writes.
    """
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows = query_start.shape[0]
    block_v = min(32, next_power_of_2(value_dim))
    _recurrent_kernel[(rows * v_heads, cdiv(value_dim, block_v))](
        mixed_qkv,
        a,
        b,
        A_log.contiguous(),
        dt_bias.contiguous(),
        ssm_state,
        out,
        query_start,
        query_end,
        initial_slots,
        output_slots,
        query_start if snapshot_slots is None else snapshot_slots,
        max_query_len,
        key_dim**-0.5,
        *mixed_qkv.stride(),
        *a.stride(),
        *b.stride(),
        *ssm_state.stride(),
        *out.stride(),
        initial_slots.stride(0),
        *output_slots.stride(),
        K_HEADS=num_k_heads,
        V_HEADS=v_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_K=next_power_of_2(key_dim),
        BLOCK_V=block_v,
        HAS_SNAPSHOT=snapshot_slots is not None,
        num_warps=4,
    )
