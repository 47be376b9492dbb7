"""A decode step in two launches: what is small and shared first, then every head's state by a program of its own."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from qwen3next_plugin.kernels.gdn.triton_decode import _advance_window
from qwen3next_plugin.kernels.gdn.triton_formula import EPSILON, as_stored, decay_of
from qwen3next_plugin.kernels.integers import cdiv, next_power_of_2
from qwen3next_plugin.kernels.norm import rms_norm_gated
from qwen3next_plugin.kernels.ranges import BLOCK_ROWS, covered

APART, WITHIN, LAST = 0, 1, 2  # the norm: a launch behind, in the head's only program, in the last of the head's


@triton.jit
def _convolved(
    x, x_column, weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
    slot, snapshot, first_channel, first_head, heads,
    HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr,
):  # fmt: skip
    """Of HEADS heads: the convolution's outputs [HEADS, BLOCK_D], their channels, and which there are."""
    index = tl.arange(0, HEADS * BLOCK_D)
    head, place = first_head + index // BLOCK_D, index % BLOCK_D
    y = _advance_window(
        x, x_column, weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
        slot, snapshot, first_channel + head * DIM + place, (head < heads) & (place < DIM),
        WIDTH, BLOCK_W, HAS_SNAPSHOT,
    )  # fmt: skip
    heads_of = (first_head + tl.arange(0, HEADS))[:, None]
    places = tl.arange(0, BLOCK_D)[None, :]
    return tl.reshape(y, (HEADS, BLOCK_D)), first_channel + heads_of * DIM + places, (heads_of < heads) & (places < DIM)


@triton.jit(
    do_not_specialize=["num_rows", "num_tokens", "slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_slots"],
)
def _prepare_kernel(
    qkv, a, b, conv_weight, A_log, dt_bias, windows, out, flat, gates, counters,
    query_start, query_end, slots, snapshot_slots, num_rows, num_tokens, scale,
    qkv_token, qkv_column, a_token, a_head, b_token, b_head, weight_channel, weight_tap,
    window_slot, window_channel, window_column, out_token, out_head, out_v, slots_stride,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    HEADS: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_V: tl.constexpr, WIDTH: tl.constexpr, BLOCK_W: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, HAS_SNAPSHOT: tl.constexpr, COUNTED: tl.constexpr, SPLIT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """flat [N, conv_dim] float32: q | k | v convolved, q and k normalised; gates [N, 2, HV] float32: decay, beta.

    SPLIT: of q, and then of k, all upper halves of their floats as int16 and then all lower ones: loads of 16-bit
    numbers are laid out as those of a 16-bit state are, eight to a thread.
    A program has HEADS heads of q, of k or of v, and alone their windows.
    """
    if PDL:
        gdc_launch_dependents()  # they have their states to ask for, and wait before they read what is written here
    KEY_BLOCKS: tl.constexpr = (K_HEADS + HEADS - 1) // HEADS
    BLOCKS: tl.constexpr = 2 * KEY_BLOCKS + (V_HEADS + HEADS - 1) // HEADS
    CHANNELS: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    place = (tl.program_id(0) // BLOCKS).to(tl.int64)
    block = tl.program_id(0) % BLOCKS
    start = tl.load(query_start + place, mask=place < num_rows, other=0).to(tl.int64)
    end = tl.load(query_end + place, mask=place < num_rows, other=0).to(tl.int64)
    slot = tl.load(slots + place * slots_stride, mask=place < num_rows, other=-1).to(tl.int64)
    live = (slot >= 0) & (end > start)
    first_value = (block - 2 * KEY_BLOCKS) * HEADS  # negative where it has keys
    alone = (first_value >= 0) & (place < num_tokens) & ((start != place) | (live == 0))
    if alone:
        token = place + tl.arange(0, 1)
        if tl.max(covered(token, query_start, query_end, 1, slots, slots_stride, num_rows, BLOCK_ROWS), 0) == 0:
            head_of, v_of = first_value + tl.arange(0, HEADS)[:, None], tl.arange(0, BLOCK_V)[None, :]
            zeros = tl.zeros((HEADS, BLOCK_V), tl.float32).to(out.dtype.element_ty)
            there = (head_of < V_HEADS) & (v_of < VALUE_DIM)
            tl.store(out + place * out_token + head_of * out_head + v_of * out_v, zeros, mask=there)
    if live == 0:
        return
    snapshot = tl.load(snapshot_slots + place).to(tl.int64) if HAS_SNAPSHOT else slot
    x = qkv + start * qkv_token
    to = flat + place * CHANNELS
    if first_value < 0:
        is_key = block >= KEY_BLOCKS
        y, channel, there = _convolved(
            x, qkv_column, conv_weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
            slot, snapshot, tl.where(is_key, 1, 0) * (K_HEADS * KEY_DIM), block % KEY_BLOCKS * HEADS, K_HEADS,
            HEADS, KEY_DIM, BLOCK_K, WIDTH, BLOCK_W, HAS_SNAPSHOT,
        )  # fmt: skip
        y *= (tl.where(is_key, 1.0, scale) / tl.sqrt(tl.sum(y * y, 1) + EPSILON))[:, None]
        if SPLIT:
            bits = y.to(tl.int32, bitcast=True)
            section = (to + tl.where(is_key, 1, 0) * (K_HEADS * KEY_DIM)).to(tl.pointer_type(tl.int16))
            at = section + (channel - tl.where(is_key, 1, 0) * (K_HEADS * KEY_DIM))
            tl.store(at, (bits >> 16).to(tl.int16), mask=there)
            tl.store(at + K_HEADS * KEY_DIM, bits.to(tl.int16), mask=there)
        else:
            tl.store(to + channel, y, mask=there)
    else:
        y, channel, there = _convolved(
            x, qkv_column, conv_weight, weight_channel, weight_tap, windows, window_slot, window_channel, window_column,
            slot, snapshot, 2 * K_HEADS * KEY_DIM, first_value, V_HEADS,
            HEADS, VALUE_DIM, BLOCK_V, WIDTH, BLOCK_W, HAS_SNAPSHOT,
        )  # fmt: skip
        tl.store(to + channel, y, mask=there)
        head = first_value + tl.arange(0, HEADS)
        known = head < V_HEADS
        log_rate = tl.load(A_log + head, mask=known, other=0.0).to(tl.float32)
        bias = tl.load(dt_bias + head, mask=known, other=0.0).to(tl.float32)
        a_value = tl.load(a + start * a_token + head * a_head, mask=known, other=0.0).to(tl.float32)
        b_value = tl.load(b + start * b_token + head * b_head, mask=known, other=0.0).to(tl.float32)
        gate = gates + place * (2 * V_HEADS) + head
        tl.store(gate, decay_of(a_value, log_rate, bias), mask=known)
        tl.store(gate + V_HEADS, tl.sigmoid(b_value), mask=known)
        if COUNTED:
            tl.store(counters + place * V_HEADS + head, tl.zeros((HEADS,), tl.int32), mask=known)


@triton.jit
def _joined(high_at, low_at):
    """float32 of their halves, unmasked."""
    high, low = tl.load(high_at).to(tl.int32), tl.load(low_at).to(tl.int32)
    return ((high << 16) | (low & 0xFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def _advanced(s, q, k, v, decay, beta):
    """`advance_once` of a state [C, R, S, K / C], q and k [C, 1, S or 1, K / C], v [R, S]; the output is [R, S].

    A thread adds up its chunks before it asks other threads.
    """
    read_k = tl.sum(tl.sum(s * k, 0), 2)
    read_q = tl.sum(tl.sum(s * q, 0), 2)
    key_query = tl.sum(tl.sum(k * q, 0), 2)
    written = beta * (v - decay * read_k)
    update = tl.broadcast_to(written[None, :, :, None], s.shape)
    return tl.fma(update, tl.broadcast_to(k, s.shape), s * decay), decay * read_q + key_query * written


@triton.jit
def _kept(s, at, there, state, snapshot, slot, state_slot, WHOLE: tl.constexpr, HAS_SNAPSHOT: tl.constexpr):
    if WHOLE:
        tl.store(at, as_stored(s, state))
    else:
        tl.store(at, as_stored(s, state), mask=there)
    if HAS_SNAPSHOT:
        if snapshot >= 0:
            tl.store(at + (snapshot - slot) * state_slot, as_stored(s, state), mask=there)


@triton.jit(
    do_not_specialize=["slots_stride"],
    do_not_specialize_on_alignment=["query_start", "query_end", "slots", "snapshot_slots"],
)
def _recur_kernel(
    z, norm_weight, state, out, flat, gates, raw, counters, query_start, query_end, slots, snapshot_slots, norm_eps,
    z_token, z_head, z_v, state_slot, state_head, STATE_V: tl.constexpr, STATE_K: tl.constexpr,
    out_token, out_head, out_v, slots_stride,
    K_HEADS: tl.constexpr, V_HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr,
    CHUNKS: tl.constexpr, SPREAD: tl.constexpr, OWN_KEYS: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr, PARTS: tl.constexpr, NORM: tl.constexpr,
    EARLY: tl.constexpr, LATE: tl.constexpr, HALVES: tl.constexpr, SPLIT: tl.constexpr,
    HAS_SNAPSHOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row, value head and part of V. raw [N, HV, PARTS * BLOCK_V] float32, counters [N, HV] of LAST."""
    CHANNELS: tl.constexpr = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
    LANES: tl.constexpr = BLOCK_K // CHUNKS
    ROWS: tl.constexpr = BLOCK_V // 2 if HALVES else BLOCK_V
    row = (tl.program_id(0) // (V_HEADS * PARTS)).to(tl.int64)
    head = tl.program_id(0) // PARTS % V_HEADS
    part = tl.program_id(0) % PARTS
    # Before the wait only what the launch in front writes nowhere: rows, slots, z, weights and states.
    start = tl.load(query_start + row).to(tl.int64)
    end = tl.load(query_end + row).to(tl.int64)
    slot = tl.load(slots + row * slots_stride).to(tl.int64)
    live = (slot >= 0) & (end > start)
    if live == 0:
        if PDL:
            gdc_wait()  # so that who waits for this launch has waited for the one in front as well
        return
    # Rows of V by which thread has them: loads of q and k as wide as that are laid out as the state is.
    k_index = tl.arange(0, CHUNKS)[:, None, None, None] * LANES + tl.arange(0, LANES)[None, None, None, :]
    v_index = part * BLOCK_V + tl.arange(0, ROWS // SPREAD)[:, None] * SPREAD + tl.arange(0, SPREAD)[None, :]
    k_mask, v_mask = k_index < KEY_DIM, v_index < VALUE_DIM
    there = k_mask & v_mask[None, :, :, None]
    at = state + slot * state_slot + head * state_head + v_index[None, :, :, None] * STATE_V + k_index * STATE_K
    WHOLE: tl.constexpr = KEY_DIM == BLOCK_K and VALUE_DIM % BLOCK_V == 0
    there_2 = k_mask & (v_index + ROWS < VALUE_DIM)[None, :, :, None]
    s = tl.load(at) if WHOLE else tl.load(at, mask=there, other=0.0)
    if HALVES:
        s_2 = tl.load(at + ROWS * STATE_V) if WHOLE else tl.load(at + ROWS * STATE_V, mask=there_2, other=0.0)
    gate_at = z + start * z_token + head * z_head + v_index * z_v
    v_mask_2 = v_index + ROWS < VALUE_DIM
    if NORM == 1 and LATE == 0:
        gate = tl.load(gate_at, mask=v_mask, other=0.0).to(tl.float32)
        norm = tl.load(norm_weight + v_index, mask=v_mask, other=0.0).to(tl.float32)
        if HALVES:
            gate_2 = tl.load(gate_at + ROWS * z_v, mask=v_mask_2, other=0.0).to(tl.float32)
            norm_2 = tl.load(norm_weight + v_index + ROWS, mask=v_mask_2, other=0.0).to(tl.float32)
    snapshot = tl.load(snapshot_slots + row).to(tl.int64) if HAS_SNAPSHOT else slot
    if PDL:
        gdc_wait()
    KEYS: tl.constexpr = K_HEADS * KEY_DIM
    key_at = head // (V_HEADS // K_HEADS) * KEY_DIM + k_index
    if OWN_KEYS:  # every thread loads what it needs, though others load the same
        key_at += tl.zeros((1, 1, SPREAD, 1), tl.int32)
    keys = flat + row * CHANNELS + key_at
    values = flat + row * CHANNELS + 2 * K_HEADS * KEY_DIM + head * VALUE_DIM + v_index
    if SPLIT:
        halves = (flat + row * CHANNELS).to(tl.pointer_type(tl.int16)) + key_at
        q, k = _joined(halves, halves + KEYS), _joined(halves + 2 * KEYS, halves + 3 * KEYS)
    elif WHOLE:
        q, k = tl.load(keys), tl.load(keys + K_HEADS * KEY_DIM)
    else:
        q = tl.load(keys, mask=k_mask, other=0.0)
        k = tl.load(keys + K_HEADS * KEY_DIM, mask=k_mask, other=0.0)
    v = tl.load(values, mask=v_mask, other=0.0)
    decay = tl.load(gates + row * (2 * V_HEADS) + head)
    beta = tl.load(gates + row * (2 * V_HEADS) + V_HEADS + head)
    s_new, o = _advanced(s.to(tl.float32), q, k, v, decay, beta)
    raw_at = raw + (row * V_HEADS + head) * (PARTS * BLOCK_V)
    counter = counters + row * V_HEADS + head
    if EARLY:  # the fence before a program says so has then no stores of a state to wait for
        tl.store(raw_at + v_index, o)
        tl.debug_barrier()
        done = tl.atomic_add(counter, 1, sem="acq_rel")
    _kept(s_new, at, there, state, snapshot, slot, state_slot, WHOLE, HAS_SNAPSHOT)
    if HALVES:
        v_2 = tl.load(values + ROWS, mask=v_index + ROWS < VALUE_DIM, other=0.0)
        s_new, o_2 = _advanced(s_2.to(tl.float32), q, k, v_2, decay, beta)
        _kept(s_new, at + ROWS * STATE_V, there_2, state, snapshot, slot, state_slot, WHOLE, HAS_SNAPSHOT)

    to = out + start * out_token + head * out_head
    if NORM == 0:
        tl.store(to + v_index * out_v, o.to(out.dtype.element_ty), mask=v_mask)
    elif NORM == 1:
        squares = tl.sum(tl.sum(o * o, 1), 0)
        if HALVES:
            squares += tl.sum(tl.sum(o_2 * o_2, 1), 0)
        if LATE:
            gate = tl.load(gate_at, mask=v_mask, other=0.0).to(tl.float32)
            norm = tl.load(norm_weight + v_index, mask=v_mask, other=0.0).to(tl.float32)
        if LATE and HALVES:
            gate_2 = tl.load(gate_at + ROWS * z_v, mask=v_mask_2, other=0.0).to(tl.float32)
            norm_2 = tl.load(norm_weight + v_index + ROWS, mask=v_mask_2, other=0.0).to(tl.float32)
        root = tl.rsqrt(squares / VALUE_DIM + norm_eps)
        y = o * root * norm * gate * tl.sigmoid(gate)
        tl.store(to + v_index * out_v, y.to(out.dtype.element_ty), mask=v_mask)
        if HALVES:
            y = o_2 * root * norm_2 * gate_2 * tl.sigmoid(gate_2)
            tl.store(to + (v_index + ROWS) * out_v, y.to(out.dtype.element_ty), mask=v_index + ROWS < VALUE_DIM)
    else:
        if EARLY == 0:
            tl.store(raw_at + v_index, o)
            tl.debug_barrier()  # all of the program's outputs are there before one of its threads says so
            done = tl.atomic_add(counter, 1, sem="acq_rel")
        if done == PARTS - 1:
            v_all = tl.arange(0, PARTS * BLOCK_V)
            all_mask = v_all < VALUE_DIM
            o_all = tl.load(raw_at + v_all, mask=all_mask, other=0.0, cache_modifier=".cg")
            gate = tl.load(z + start * z_token + head * z_head + v_all * z_v, mask=all_mask, other=0.0).to(tl.float32)
            norm = tl.load(norm_weight + v_all, mask=all_mask, other=0.0).to(tl.float32)
            root = tl.rsqrt(tl.sum(o_all * o_all, 0) / VALUE_DIM + norm_eps)
            y = o_all * root * norm * gate * tl.sigmoid(gate)
            tl.store(to + v_all * out_v, y.to(out.dtype.element_ty), mask=all_mask)


@dataclass(frozen=True)
class Two:
    """How the two launches are built.

    rows: of V a program, None: all. chunks: of K for float32 states, half as many for 16 bits, each of K / chunks
    elements side by side. spread: rows of V side by side; each thread loads keys
    of its own then, None: they go through shared memory. early: outputs before the state; late: gates behind it.
    registers: at most, a thread; heads: a program in front.
    """

    rows: int | None = None
    warps: int = 4
    chunks: int = 1
    spread: int | None = None
    norm: int = WITHIN
    early: bool = False
    late: bool = False
    halves: bool = False
    pdl: bool = False
    registers: int | None = None
    heads: int = 8
    prepare_warps: int = 4


def decode_two(
    two, mixed_qkv, z, gates, conv_weight, norm_weight, norm_eps, conv_state, ssm_state, num_k_heads,
    query_start, query_end, state_slots, out, snapshot_slots,
):  # fmt: skip
    """`triton_decode.gdn_decode_fused`, built as ``two`` says."""
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    block_k, block_v = next_power_of_2(key_dim), next_power_of_2(value_dim)
    part = block_v if two.rows is None else min(two.rows, block_v)
    parts = block_v // part
    per_half = part // 2 if two.halves else part
    own_keys = two.spread is not None
    spread = min(two.spread, per_half) if own_keys else per_half
    split = own_keys and ssm_state.element_size() == 2 and key_dim == block_k and value_dim % part == 0
    # A thread has 16 bytes of each chunk.
    chunks = min(max(1, two.chunks * ssm_state.element_size() // 4), block_k)
    device, counted = mixed_qkv.device, two.norm == LAST
    flat = torch.empty(rows, mixed_qkv.shape[1], dtype=torch.float32, device=device)
    coefficients = torch.empty(rows, 2, v_heads, dtype=torch.float32, device=device)
    raw, counters = flat, flat
    if counted:
        raw = torch.empty(rows, v_heads, block_v, dtype=torch.float32, device=device)
        counters = torch.empty(rows, v_heads, dtype=torch.int32, device=device)
    kept = query_start if snapshot_slots is None else snapshot_slots
    blocks = 2 * cdiv(num_k_heads, two.heads) + cdiv(v_heads, two.heads)
    _prepare_kernel[(max(rows, tokens) * blocks,)](
        mixed_qkv, a, b, conv_weight, A_log.contiguous(), dt_bias.contiguous(), conv_state, out, flat, coefficients,
        counters, query_start, query_end, state_slots, kept, rows, tokens, key_dim**-0.5,
        *mixed_qkv.stride(), *a.stride(), *b.stride(), *conv_weight.stride(), *conv_state.stride(), *out.stride(),
        state_slots.stride(0),
        K_HEADS=num_k_heads, V_HEADS=v_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, HEADS=two.heads, BLOCK_K=block_k,
        BLOCK_V=block_v, WIDTH=width, BLOCK_W=next_power_of_2(width), BLOCK_ROWS=BLOCK_ROWS,
        HAS_SNAPSHOT=snapshot_slots is not None, COUNTED=counted, SPLIT=split, PDL=two.pdl, num_warps=two.prepare_warps,
    )  # fmt: skip
    options = {"num_warps": two.warps}
    if two.registers is not None:
        options["maxnreg"] = two.registers
    if two.pdl:
        options["launch_pdl"] = True
    _recur_kernel[(rows * v_heads * parts,)](
        z, norm_weight.contiguous(), ssm_state, out, flat, coefficients, raw, counters, query_start, query_end,
        state_slots, kept, norm_eps, *z.stride(), *ssm_state.stride(), *out.stride(), state_slots.stride(0),
        K_HEADS=num_k_heads, V_HEADS=v_heads, KEY_DIM=key_dim, VALUE_DIM=value_dim, CHUNKS=chunks,
        SPREAD=spread, OWN_KEYS=own_keys, BLOCK_K=block_k, BLOCK_V=part, PARTS=parts, NORM=two.norm,
        EARLY=two.early and counted, LATE=two.late,
        HALVES=two.halves, SPLIT=split,
        HAS_SNAPSHOT=snapshot_slots is not None, PDL=two.pdl, **options,
    )  # fmt: skip
    if two.norm == APART:
        rms_norm_gated(out, z, norm_weight, norm_eps, out=out)
