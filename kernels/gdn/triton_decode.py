"""A whole decode step of a layer in one Triton kernel: convolution, gates, delta rule, gated norm."""

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra import cuda

from ..early import begins_early, launch_options
from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS, covered
from .config import decode_tile, table_of
from .reference import Gates
from .triton_decode_staged import gdn_decode_staged_kernel
from .triton_formula import advance_once, as_stored, decay_of
from .triton_window import advance_keys, advance_window

ELEMENTS_A_WARP = 1024  # at least, of a head that is held whole


# What changes from step to step is not specialised on, nor is where arrays of rows begin, which are slices of a step's:
# a new batch never compiles anything.
@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_slots"],
)
def _gdn_decode_kernel(
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
    query_start,
    query_end,
    slots,
    snapshot_slots,
    num_rows,
    num_tokens,
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
    GROUP: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    V_BLOCKS: tl.constexpr,
    AHEAD: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
    EARLY: tl.constexpr,
):
    # One program a row and key head, for all of its value heads: alone it reads and moves that key head's windows.
    place = (tl.program_id(0) // K_HEADS).to(tl.int64)  # a row, and a token of the same number
    k_head = tl.program_id(0) % K_HEADS
    first_head = k_head * GROUP
    start = tl.load(query_start + place, mask=place < num_rows, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=place < num_rows, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=place < num_rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (end > start)
    k_index = tl.arange(0, BLOCK_K)
    v_all = tl.arange(0, V_BLOCKS)[:, None] * BLOCK_V + tl.arange(0, BLOCK_V)[None, :]
    k_mask = k_index < KEY_DIM
    in_head = v_all < VALUE_DIM

    # The largest read by far is asked for first, before the projections that come in are there; the next tile once this
    # one is stored, or (AHEAD) before.
    rows_of_tile = tl.arange(0, BLOCK_V)
    tile = (rows_of_tile < VALUE_DIM)[:, None] & k_mask[None, :]
    state_at = state + slot * state_slot + rows_of_tile[:, None] * state_v + k_index[None, :] * state_k
    if EARLY:
        ahead = tl.load(state_at + first_head * state_head, mask=tile & live, other=0.0)
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()

    # Row n has token n as a rule; every other token looks for its row, and has zeros if there is none.
    alone = (place < num_tokens) & ((start != place) | (live == 0))
    if alone:
        token = place + tl.arange(0, 1)
        if tl.max(covered(token, query_start, query_end, 1, slots, slots_stride, num_rows, BLOCK_ROWS), 0) == 0:
            zeros = tl.zeros((V_BLOCKS, BLOCK_V), tl.float32).to(out.dtype.element_ty)
            for head in range(first_head, first_head + GROUP):
                tl.store(out + place * out_token + head * out_head + v_all * out_v, zeros, mask=in_head)
    if live == 0:
        return

    if not EARLY:
        ahead = tl.load(state_at + first_head * state_head, mask=tile, other=0.0)
    snapshot = tl.load(snapshot_slots + place).to(tl.int64) if HAS_SNAPSHOT else slot
    x = qkv + start * qkv_token
    q, k = advance_keys(
        x,
        qkv_column,
        conv_weight,
        weight_channel,
        weight_tap,
        windows,
        window_slot,
        window_channel,
        window_column,
        slot,
        snapshot,
        k_head,
        k_index,
        scale,
        K_HEADS,
        KEY_DIM,
        WIDTH,
        BLOCK_W,
        HAS_SNAPSHOT,
    )
    norm = tl.load(norm_weight + v_all, mask=in_head, other=0.0).to(tl.float32)

    for group in range(GROUP):
        head = first_head + group
        log_rate, bias = tl.load(A_log + head).to(tl.float32), tl.load(dt_bias + head).to(tl.float32)
        decay = decay_of(tl.load(a + start * a_token + head * a_head).to(tl.float32), log_rate, bias)
        beta = tl.sigmoid(tl.load(b + start * b_token + head * b_head).to(tl.float32))
        gate_at = z + start * z_token + head * z_head + v_all * z_v
        gate = tl.load(gate_at, mask=in_head, other=0.0).to(tl.float32)
        o_all = tl.zeros((V_BLOCKS, BLOCK_V), tl.float32)
        for block in range(V_BLOCKS):
            s = ahead.to(tl.float32)
            # An address anew from the numbers of its tile: one carried along would lose what is known of its alignment.
            done = group * V_BLOCKS + block + 1
            next_head, next_row = first_head + done // V_BLOCKS, (done % V_BLOCKS) * BLOCK_V
            end_row = tl.where(done < GROUP * V_BLOCKS, VALUE_DIM, 0)
            more = (next_row + rows_of_tile < end_row)[:, None] & k_mask[None, :]
            following = state_at + (next_head * state_head + next_row * state_v)
            if AHEAD:
                ahead = tl.load(following, mask=more, other=0.0)
            v_index = block * BLOCK_V + rows_of_tile
            v_mask = v_index < VALUE_DIM
            v = advance_window(
                x,
                qkv_column,
                conv_weight,
                weight_channel,
                weight_tap,
                windows,
                window_slot,
                window_channel,
                window_column,
                slot,
                snapshot,
                2 * K_HEADS * KEY_DIM + head * VALUE_DIM + v_index,
                v_mask,
                WIDTH,
                BLOCK_W,
                HAS_SNAPSHOT,
            )
            s, o = advance_once(s, q, k, v, decay, beta)
            target = state_at + (head * state_head + block * BLOCK_V * state_v)
            tl.store(target, as_stored(s, state), mask=v_mask[:, None] & k_mask[None, :])
            if HAS_SNAPSHOT:
                kept = (v_index < tl.where(snapshot >= 0, VALUE_DIM, 0))[:, None] & k_mask[None, :]
                tl.store(target + (snapshot - slot) * state_slot, as_stored(s, state), mask=kept)
            if AHEAD == 0:
                ahead = tl.load(following, mask=more, other=0.0)
            o_all = tl.where((tl.arange(0, V_BLOCKS) == block)[:, None], o[None, :], o_all)

        root = tl.rsqrt(tl.sum(tl.sum(o_all * o_all, 1), 0) / VALUE_DIM + norm_eps)
        y = o_all * root * norm * gate * tl.sigmoid(gate)
        tl.store(out + start * out_token + head * out_head + v_all * out_v, y.to(out.dtype.element_ty), mask=in_head)


def gdn_decode_fused(
    mixed_qkv: Tensor,
    z: Tensor,
    gates: Gates,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_state: Tensor,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_decode_fused`; arguments are checked there.

    A program holds a tile of a head's state in registers from its only read to its last write, and goes through the
    value heads of one key head of one row: the q and k windows that these share are read once, and moved by who read
    them. The outputs stay in registers for the norm, except where the table's tile has stages
    (:mod:`.triton_decode_staged`).
    """
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    block_k, block_v = next_power_of_2(key_dim), next_power_of_2(value_dim)
    programs = max(rows, tokens) * num_k_heads
    # A batch that fills the GPU goes through a state in small tiles, so that several programs share a multiprocessor
    # and one computes while others wait for memory; a program asks for the next tile before it works on this one, for
    # which a whole state would leave no registers, or, in stages, for several through shared memory.
    tile = decode_tile(table_of(ssm_state.device), ssm_state.element_size(), programs)
    num_warps = max(1, min(tile.num_warps, block_k * block_v // ELEMENTS_A_WARP))
    elements = tile.elements or block_k * block_v
    tiled = block_k * block_v > elements
    if tiled:
        block_v, num_warps = max(1, elements // block_k), tile.num_warps
    tiles, group = cdiv(value_dim, block_v), v_heads // num_k_heads
    inputs = (mixed_qkv, z, a, b, conv_weight, A_log.contiguous(), dt_bias.contiguous(), norm_weight.contiguous())
    numbers = (
        query_start,
        query_end,
        state_slots,
        query_start if snapshot_slots is None else snapshot_slots,
        rows,
        tokens,
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
    )
    shape = {
        "K_HEADS": num_k_heads,
        "GROUP": group,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "WIDTH": width,
        "BLOCK_K": block_k,
        "BLOCK_V": block_v,
        "BLOCK_W": next_power_of_2(width),
        "BLOCK_ROWS": BLOCK_ROWS,
        "HAS_SNAPSHOT": snapshot_slots is not None,
        "num_warps": num_warps,
    }
    if tiled and tile.num_stages > 1:
        scratch = torch.empty(2 * rows * v_heads * value_dim, dtype=torch.float32, device=out.device)
        gdn_decode_staged_kernel[(programs,)](
            *inputs,
            conv_state,
            ssm_state,
            out,
            scratch,
            *numbers,
            **shape,
            BLOCK_HEAD=next_power_of_2(value_dim),
            BLOCK_GROUP=next_power_of_2(group),
            TILES=tiles,
            STAGES=tile.num_stages,
        )
        return
    blocks, early = next_power_of_2(tiles), begins_early(out.device, max(rows, tokens))
    ahead = {"V_BLOCKS": blocks, "AHEAD": tiled, "EARLY": early, **launch_options(early)}
    _gdn_decode_kernel[(programs,)](*inputs, conv_state, ssm_state, out, *numbers, **shape, **ahead)
