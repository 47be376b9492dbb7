"""The control: today's program of a row and key head, whose tiles come through shared memory, stages ahead."""

import torch
import triton
import triton.language as tl
from gdn_two import _convolved

from qwen3next_plugin.kernels.gdn.triton_decode import _advance_window
from qwen3next_plugin.kernels.gdn.triton_formula import EPSILON, advance_once, as_stored, decay_of
from qwen3next_plugin.kernels.integers import next_power_of_2
from qwen3next_plugin.kernels.ranges import BLOCK_ROWS, covered


@triton.jit(do_not_specialize=["num_rows", "num_tokens", "slots_stride"])
def _tiled_kernel(
    qkv, z, a, b, conv_weight, A_log, dt_bias, norm_weight, windows, state, out, values, raw,
    query_start, query_end, slots, snapshot_slots, num_rows, num_tokens, scale, norm_eps,
    qkv_token, qkv_column, z_token, z_head, z_v, a_token, a_head, b_token, b_head, weight_channel, weight_tap,
    window_slot, window_channel, window_column, state_slot, state_head, state_v, state_k,
    out_token, out_head, out_v, slots_stride,
    K_HEADS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr, BLOCK_V: tl.constexpr, STAGES: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK_W: tl.constexpr, BLOCK_ROWS: tl.constexpr, HAS_SNAPSHOT: tl.constexpr,
):  # fmt: skip
    """Heads of DIM, a power of two, GROUP one too (the lab's shapes only)."""
    TILES: tl.constexpr = DIM // BLOCK_V
    place = (tl.program_id(0) // K_HEADS).to(tl.int64)
    k_head = tl.program_id(0) % K_HEADS
    start = tl.load(query_start + place, mask=place < num_rows, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=place < num_rows, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=place < num_rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (end > start)
    heads = k_head * GROUP + tl.arange(0, GROUP)
    v_all = tl.arange(0, DIM)
    alone = (place < num_tokens) & ((start != place) | (live == 0))
    if alone:
        token = place + tl.arange(0, 1)
        if tl.max(covered(token, query_start, query_end, 1, slots, slots_stride, num_rows, BLOCK_ROWS), 0) == 0:
            zeros = tl.zeros((GROUP, DIM), tl.float32).to(out.dtype.element_ty)
            tl.store(out + place * out_token + heads[:, None] * out_head + v_all[None, :] * out_v, zeros)
    if live == 0:
        return
    snapshot = tl.load(snapshot_slots + place).to(tl.int64) if HAS_SNAPSHOT else slot
    x = qkv + start * qkv_token
    k_index = tl.arange(0, DIM)
    q = _advance_window(
        x, qkv_column, conv_weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
        slot, snapshot, k_head * DIM + k_index, k_index < DIM, WIDTH, BLOCK_W, HAS_SNAPSHOT,
    )  # fmt: skip
    k = _advance_window(
        x, qkv_column, conv_weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
        slot, snapshot, (K_HEADS + k_head) * DIM + k_index, k_index < DIM, WIDTH, BLOCK_W, HAS_SNAPSHOT,
    )  # fmt: skip
    v, _, _ = _convolved(
        x, qkv_column, conv_weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
        slot, snapshot, 2 * K_HEADS * DIM, k_head * GROUP, K_HEADS * GROUP,
        GROUP, DIM, DIM, WIDTH, BLOCK_W, HAS_SNAPSHOT,
    )  # fmt: skip
    # Whatever a tile needs of v goes through memory: registers cannot be indexed by a tile's number.
    mine = (place * K_HEADS + k_head) * (GROUP * DIM)
    all_at = mine + tl.arange(0, GROUP)[:, None] * DIM + v_all[None, :]
    tl.store(values + all_at, v)
    tl.debug_barrier()
    q = q * (scale / tl.sqrt(tl.sum(q * q, 0) + EPSILON))
    k = k / tl.sqrt(tl.sum(k * k, 0) + EPSILON)
    log_rate, bias = tl.load(A_log + heads).to(tl.float32), tl.load(dt_bias + heads).to(tl.float32)
    decays = decay_of(tl.load(a + start * a_token + heads * a_head).to(tl.float32), log_rate, bias)
    betas = tl.sigmoid(tl.load(b + start * b_token + heads * b_head).to(tl.float32))
    rows_of_tile = tl.arange(0, BLOCK_V)
    at = state + slot * state_slot + k_head * GROUP * state_head
    at += rows_of_tile[:, None] * state_v + k_index[None, :] * state_k
    for tile in tl.range(0, GROUP * TILES, num_stages=STAGES):
        group = tile // TILES
        here = at + (group * state_head + (tile % TILES) * BLOCK_V * state_v)
        s = tl.load(here).to(tl.float32)
        is_group = tl.arange(0, GROUP) == group
        decay, beta = tl.sum(tl.where(is_group, decays, 0.0), 0), tl.sum(tl.where(is_group, betas, 0.0), 0)
        v_tile = tl.load(values + mine + tile * BLOCK_V + rows_of_tile)
        s, o = advance_once(s, q, k, v_tile, decay, beta)
        tl.store(here, as_stored(s, state))
        if HAS_SNAPSHOT:
            kept = (rows_of_tile < tl.where(snapshot >= 0, BLOCK_V, 0))[:, None] & (k_index < DIM)[None, :]
            tl.store(here + (snapshot - slot) * state_slot, as_stored(s, state), mask=kept)
        tl.store(raw + mine + tile * BLOCK_V + rows_of_tile, o)
    tl.debug_barrier()
    o_all = tl.load(raw + all_at)
    gate = tl.load(z + start * z_token + heads[:, None] * z_head + v_all[None, :] * z_v).to(tl.float32)
    norm = tl.load(norm_weight + v_all).to(tl.float32)[None, :]
    root = tl.rsqrt(tl.sum(o_all * o_all, 1) / DIM + norm_eps)[:, None]
    y = o_all * root * norm * gate * tl.sigmoid(gate)
    tl.store(out + start * out_token + heads[:, None] * out_head + v_all[None, :] * out_v, y.to(out.dtype.element_ty))


def decode_tiled(
    block_v, stages, warps, mixed_qkv, z, gates, conv_weight, norm_weight, norm_eps, conv_state, ssm_state,
    num_k_heads, query_start, query_end, state_slots, out, snapshot_slots,
):  # fmt: skip
    """`triton_decode.gdn_decode_fused` in tiles of ``block_v`` rows, ``stages`` of them in flight."""
    a, b, A_log, dt_bias = gates
    _, v_heads, _, dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    values, raw = (torch.empty(rows, v_heads, dim, dtype=torch.float32, device=out.device) for _ in range(2))
    _tiled_kernel[(max(rows, tokens) * num_k_heads,)](
        mixed_qkv, z, a, b, conv_weight, A_log.contiguous(), dt_bias.contiguous(), norm_weight.contiguous(),
        conv_state, ssm_state, out, values, raw, query_start, query_end, state_slots,
        query_start if snapshot_slots is None else snapshot_slots, rows, tokens, dim**-0.5, norm_eps,
        *mixed_qkv.stride(), *z.stride(), *a.stride(), *b.stride(), *conv_weight.stride(), *conv_state.stride(),
        *ssm_state.stride(), *out.stride(), state_slots.stride(0),
        K_HEADS=num_k_heads, GROUP=v_heads // num_k_heads, DIM=dim, BLOCK_V=block_v, STAGES=stages, WIDTH=width,
        BLOCK_W=next_power_of_2(width), BLOCK_ROWS=BLOCK_ROWS, HAS_SNAPSHOT=snapshot_slots is not None,
        num_warps=warps,
    )  # fmt: skip
