"""Whole rows for a few tokens, new: pairs of an expert by one program, walks over rows, launches that begin early."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tlc

from qwen3next_plugin.kernels.gemm.policy import weight_codes
from qwen3next_plugin.kernels.gemm.reference import block_size
from qwen3next_plugin.kernels.gemm.triton import widened


@triton.jit
def _add_both(a, b, c, d):
    return a + c, b + d


@triton.jit
def _loaded(pointers, mask, EVEN: tl.constexpr):
    if EVEN:
        return tl.load(pointers, eviction_policy="evict_first")
    else:
        return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _pair_of(place, tokens, CHOICES: tl.constexpr):
    """Last choices come first, as tokens share a shared expert; then token by token: an expert's first pair has the
    fewer others the later it comes, so that no long program is among the last.
    """
    others: tl.constexpr = CHOICES - 1 if CHOICES > 1 else 1
    rest = place - tokens
    return tl.where(rest < 0, place * CHOICES + CHOICES - 1, rest // others * CHOICES + rest % others)


@triton.jit
def _add_four(a, b, c, d, e, f, g, h):
    return a + e, b + f, c + g, d + h


@triton.jit
def _apart(codes, OPAQUE: tl.constexpr):
    """The same FP8 codes, but the compiler cannot know: they are widened anew, instead of kept wide in registers."""
    if OPAQUE:
        same = tl.inline_asm_elementwise(
            "mov.b32 $0, $1;", "=r,r", [codes.to(tl.int8, bitcast=True)], dtype=tl.int8, is_pure=False, pack=4
        )
        return same.to(codes.dtype, bitcast=True)
    else:
        return codes


@triton.jit
def _walk(
    ptrs, up_offset: tl.constexpr, mask, gate_rows, up_rows, x, x2, gate_factor, up_factor, out, out2, left,
    STEPS: tl.constexpr, AHEAD: tl.constexpr, BLOCK_N: tl.constexpr, EVEN: tl.constexpr, TWO: tl.constexpr,
    OPAQUE: tl.constexpr,
):  # fmt: skip
    """STEPS times BLOCK_N rows for one pair or (TWO) two, the next ones asked for while these are multiplied."""
    places = tl.arange(0, BLOCK_N)
    for step in tl.static_range(STEPS):
        gate, up = tl.sum(widened(gate_rows) * x[None], axis=2), tl.sum(widened(up_rows) * x[None], axis=2)
        if TWO:
            gate_rows, up_rows = _apart(gate_rows, OPAQUE), _apart(up_rows, OPAQUE)
            gate2, up2 = tl.sum(widened(gate_rows) * x2[None], axis=2), tl.sum(widened(up_rows) * x2[None], axis=2)
        if step + 1 < STEPS:
            gate_rows = _loaded(ptrs + (step + 1) * AHEAD, mask, EVEN)
            up_rows = _loaded(ptrs + up_offset + (step + 1) * AHEAD, mask, EVEN)
        fits = places + step * BLOCK_N < left
        if TWO:
            g, u, g2, u2 = tl.reduce(
                (gate * gate_factor, up * up_factor, gate2 * gate_factor, up2 * up_factor), 1, _add_four
            )
            g2 = g2 * tl.sigmoid(g2) * u2
            tl.store(out2 + step * BLOCK_N, g2.to(out2.dtype.element_ty), mask=fits)
        else:
            g, u = tl.reduce((gate * gate_factor, up * up_factor), 1, _add_both)
        g = g * tl.sigmoid(g) * u
        tl.store(out + step * BLOCK_N, g.to(out.dtype.element_ty), mask=fits)


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_two_kernel(
    x_ptr, weight_ptr, scale_ptr, ids_ptr, out_ptr, num_pairs, num_experts, inner: tl.constexpr, K: tl.constexpr, x_stride,
    weight_stride_e, weight_stride_n: tl.constexpr, scale_stride_e, scale_stride_n, up_scale_offset,
    CHOICES: tl.constexpr, SCAN: tl.constexpr, LEAD: tl.constexpr, PAIRS_FASTEST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOAD: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr, OPAQUE: tl.constexpr,
):  # fmt: skip
    """As gate_up_kernel with LEAD, but that two pairs of an expert are multiplied by its weights at once."""
    if PDL:
        tlc.gdc_wait()
        tlc.gdc_launch_dependents()
    place = tl.program_id(0) if PAIRS_FASTEST else tl.program_id(1)
    part = tl.program_id(1) if PAIRS_FASTEST else tl.program_id(0)
    tokens = num_pairs // CHOICES
    pair = _pair_of(place, tokens, CHOICES)
    chosen = tl.load(ids_ptr + pair)
    lanes = tl.arange(0, SCAN)
    mine = tl.load(ids_ptr + lanes, mask=lanes < num_pairs, other=-1) == chosen
    leads = tl.min(tl.where(mine, lanes, SCAN), axis=0) == pair
    if (chosen >= 0) & (chosen < num_experts) & leads:
        expert = chosen.to(tl.int64)
        first = part * (STEPS * BLOCK_N)
        cols = first + tl.arange(0, BLOCK_N)
        begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
        ks = begins[:, None] + tl.arange(0, LOAD)[None, :]
        ptrs = weight_ptr + expert * weight_stride_e + cols[:, None, None] * weight_stride_n + ks[None]
        up_offset: tl.constexpr = inner * weight_stride_n
        AHEAD: tl.constexpr = BLOCK_N * weight_stride_n
        factors = scale_ptr + expert * scale_stride_e + first // SCALE_N * scale_stride_n + begins // SCALE_K
        mask = (cols < inner)[:, None, None] & (ks < K)[None]
        while pair < num_pairs:
            gate_rows = _loaded(ptrs, mask, EVEN)
            up_rows = _loaded(ptrs + up_offset, mask, EVEN)
            gate_factor = tl.load(factors, mask=begins < K, other=0.0)[None]
            up_factor = tl.load(factors + up_scale_offset, mask=begins < K, other=0.0)[None]
            x = tl.load(x_ptr + (pair // CHOICES).to(tl.int64) * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
            out = out_ptr + pair.to(tl.int64) * inner + cols
            second = tl.min(tl.where(mine & (lanes > pair), lanes, SCAN), axis=0)
            if second < num_pairs:
                row = x_ptr + (second // CHOICES).to(tl.int64) * x_stride
                x2 = tl.load(row + ks, mask=ks < K, other=0.0).to(tl.float32)
                out2 = out_ptr + second.to(tl.int64) * inner + cols
                _walk(
                    ptrs, up_offset, mask, gate_rows, up_rows, x, x2, gate_factor, up_factor, out, out2, inner - first,
                    STEPS, AHEAD, BLOCK_N, EVEN, True, OPAQUE,
                )  # fmt: skip
            else:
                _walk(
                    ptrs, up_offset, mask, gate_rows, up_rows, x, x, gate_factor, up_factor, out, out, inner - first,
                    STEPS, AHEAD, BLOCK_N, EVEN, False, OPAQUE,
                )  # fmt: skip
            pair = tl.min(tl.where(mine & (lanes > second), lanes, SCAN), axis=0)


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    x_ptr, weight_ptr, scale_ptr, ids_ptr, out_ptr, num_pairs, num_experts, inner: tl.constexpr, K: tl.constexpr, x_stride,
    weight_stride_e, weight_stride_n: tl.constexpr, scale_stride_e, scale_stride_n, up_scale_offset,
    CHOICES: tl.constexpr, SCAN: tl.constexpr, LEAD: tl.constexpr, PAIRS_FASTEST: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, LOAD: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tlc.gdc_wait()
        tlc.gdc_launch_dependents()
    place = tl.program_id(0) if PAIRS_FASTEST else tl.program_id(1)
    part = tl.program_id(1) if PAIRS_FASTEST else tl.program_id(0)
    tokens = num_pairs // CHOICES
    pair = _pair_of(place, tokens, CHOICES)
    chosen = tl.load(ids_ptr + pair)
    works = (chosen >= 0) & (chosen < num_experts)
    lanes = tl.arange(0, SCAN)
    if LEAD:
        mine = tl.load(ids_ptr + lanes, mask=lanes < num_pairs, other=-1) == chosen
        works &= tl.min(tl.where(mine, lanes, SCAN), axis=0) == pair
    if works:
        expert = chosen.to(tl.int64)
        first = part * (STEPS * BLOCK_N)
        cols = first + tl.arange(0, BLOCK_N)
        begins = tl.arange(0, BLOCK_K // LOAD) * LOAD
        ks = begins[:, None] + tl.arange(0, LOAD)[None, :]
        ptrs = weight_ptr + expert * weight_stride_e + cols[:, None, None] * weight_stride_n + ks[None]
        up_offset = inner * weight_stride_n
        factors = scale_ptr + expert * scale_stride_e + begins // SCALE_K
        mask = (cols < inner)[:, None, None] & (ks < K)[None]
        while pair < num_pairs:
            token = (pair // CHOICES).to(tl.int64)
            if STAGES == 0:
                gate_rows = _loaded(ptrs, mask, EVEN)
                up_rows = _loaded(ptrs + up_offset, mask, EVEN)
            x = tl.load(x_ptr + token * x_stride + ks, mask=ks < K, other=0.0).to(tl.float32)
            out = out_ptr + pair.to(tl.int64) * inner + cols
            if STAGES == 0:
                factor = factors + first // SCALE_N * scale_stride_n
                gate_factor = tl.load(factor, mask=begins < K, other=0.0)[None]
                up_factor = tl.load(factor + up_scale_offset, mask=begins < K, other=0.0)[None]
                for step in tl.static_range(STEPS):
                    gate = tl.sum(widened(gate_rows) * x[None], axis=2)
                    up = tl.sum(widened(up_rows) * x[None], axis=2)
                    if step + 1 < STEPS:
                        ahead = (step + 1) * BLOCK_N * weight_stride_n
                        gate_rows = _loaded(ptrs + ahead, mask, EVEN)
                        up_rows = _loaded(ptrs + up_offset + ahead, mask, EVEN)
                    g, u = tl.reduce((gate * gate_factor, up * up_factor), 1, _add_both)
                    g = g * tl.sigmoid(g) * u
                    tl.store(out + step * BLOCK_N, g.to(out_ptr.dtype.element_ty), mask=cols + step * BLOCK_N < inner)
            else:
                for step in tl.range(0, STEPS, num_stages=STAGES):
                    off = step * BLOCK_N * weight_stride_n
                    gate_now = _loaded(ptrs + off, mask, EVEN)
                    up_now = _loaded(ptrs + up_offset + off, mask, EVEN)
                    gate = tl.sum(widened(gate_now) * x[None], axis=2)
                    up = tl.sum(widened(up_now) * x[None], axis=2)
                    row = (first + step * BLOCK_N) // SCALE_N * scale_stride_n
                    gate *= tl.load(factors + row, mask=begins < K, other=0.0)[None]
                    up *= tl.load(factors + up_scale_offset + row, mask=begins < K, other=0.0)[None]
                    g, u = tl.reduce((gate, up), 1, _add_both)
                    g = g * tl.sigmoid(g) * u
                    tl.store(out + step * BLOCK_N, g.to(out_ptr.dtype.element_ty), mask=cols + step * BLOCK_N < inner)
            if LEAD:
                pair = tl.min(tl.where(mine & (lanes > pair), lanes, SCAN), axis=0)
            else:
                pair = num_pairs


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_by_warps_kernel(
    x_ptr, weight_ptr, scale_ptr, ids_ptr, out_ptr, num_pairs, num_experts, inner: tl.constexpr, K: tl.constexpr, x_stride,
    weight_stride_e, weight_stride_n: tl.constexpr, scale_stride_e, scale_stride_n, up_scale_offset,
    CHOICES: tl.constexpr, SCAN: tl.constexpr, LEAD: tl.constexpr, PAIRS_FASTEST: tl.constexpr,
    STEPS: tl.constexpr, BLOCK_N: tl.constexpr, CHUNKS: tl.constexpr, LANES: tl.constexpr, LOAD: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, EVEN: tl.constexpr, WIDE: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A row lies in one warp, in CHUNKS loads a thread: sums need no other warp. SCALE_N holds STEPS * BLOCK_N rows."""
    if PDL:
        tlc.gdc_wait()
        tlc.gdc_launch_dependents()
    place = tl.program_id(0) if PAIRS_FASTEST else tl.program_id(1)
    part = tl.program_id(1) if PAIRS_FASTEST else tl.program_id(0)
    tokens = num_pairs // CHOICES
    pair = _pair_of(place, tokens, CHOICES)
    chosen = tl.load(ids_ptr + pair)
    works = (chosen >= 0) & (chosen < num_experts)
    lanes = tl.arange(0, SCAN)
    if LEAD:
        mine = tl.load(ids_ptr + lanes, mask=lanes < num_pairs, other=-1) == chosen
        works &= tl.min(tl.where(mine, lanes, SCAN), axis=0) == pair
    if works:
        expert = chosen.to(tl.int64)
        first = part * (STEPS * BLOCK_N)
        cols = first + tl.arange(0, BLOCK_N)
        begins = tl.arange(0, CHUNKS)[:, None] * (LANES * LOAD) + tl.arange(0, LANES)[None, :] * LOAD
        ks = begins[:, None, :, None] + tl.arange(0, LOAD)[None, None, None, :]
        ptrs = weight_ptr + expert * weight_stride_e + cols[None, :, None, None] * weight_stride_n + ks
        up_offset = inner * weight_stride_n
        factors = scale_ptr + expert * scale_stride_e + first // SCALE_N * scale_stride_n + begins // SCALE_K
        mask = (cols < inner)[None, :, None, None] & (ks < K)
        while pair < num_pairs:
            token = (pair // CHOICES).to(tl.int64)
            gate_rows = _loaded(ptrs, mask, EVEN)
            up_rows = _loaded(ptrs + up_offset, mask, EVEN)
            gate_factor = tl.load(factors, mask=begins < K, other=0.0)[:, None, :]
            up_factor = tl.load(factors + up_scale_offset, mask=begins < K, other=0.0)[:, None, :]
            x = tl.load(x_ptr + token * x_stride + ks, mask=ks < K, other=0.0)
            if WIDE:
                x = x.to(tl.float32)
            out = out_ptr + pair.to(tl.int64) * inner + cols
            for step in tl.static_range(STEPS):
                gate = tl.sum(tl.sum(widened(gate_rows) * x.to(tl.float32), axis=3) * gate_factor, axis=0)
                up = tl.sum(tl.sum(widened(up_rows) * x.to(tl.float32), axis=3) * up_factor, axis=0)
                if step + 1 < STEPS:
                    ahead = (step + 1) * BLOCK_N * weight_stride_n
                    gate_rows = _loaded(ptrs + ahead, mask, EVEN)
                    up_rows = _loaded(ptrs + up_offset + ahead, mask, EVEN)
                g, u = tl.reduce((gate, up), 1, _add_both)
                g = g * tl.sigmoid(g) * u
                tl.store(out + step * BLOCK_N, g.to(out_ptr.dtype.element_ty), mask=cols + step * BLOCK_N < inner)
            if LEAD:
                pair = tl.min(tl.where(mine & (lanes > pair), lanes, SCAN), axis=0)
            else:
                pair = num_pairs


@triton.jit
def _choices(
    ids_ptr, topk_ptr, token, num_experts,
    FIRST: tl.constexpr, COUNT: tl.constexpr, CHOICES: tl.constexpr, BLOCK_I: tl.constexpr, LOAD: tl.constexpr,
):  # fmt: skip
    groups = tl.arange(0, COUNT * BLOCK_I // LOAD)
    choice = FIRST + groups // (BLOCK_I // LOAD)
    begins = groups % (BLOCK_I // LOAD) * LOAD
    expert = tl.load(ids_ptr + token * CHOICES + choice, mask=choice < CHOICES, other=-1).to(tl.int64)
    held = (expert >= 0) & (expert < num_experts)
    factor = tl.load(topk_ptr + token * CHOICES + choice, mask=held, other=0.0).to(tl.float32)
    return choice, begins, tl.maximum(expert, 0), held, factor


@triton.jit
def _rows(weight_ptr, rows, expert, begins, held, H: tl.constexpr, inner: tl.constexpr, stride_e, stride_n: tl.constexpr, LOAD: tl.constexpr, EVEN: tl.constexpr):
    columns = begins[:, None] + tl.arange(0, LOAD)[None, :]
    inside = held[:, None] & (columns < inner)
    places = (expert * stride_e)[:, None] + columns
    mask = tl.broadcast_to(held[None, :, None], [rows.shape[0], begins.shape[0], LOAD])
    if not EVEN:
        mask = inside[None] & (rows < H)[:, None, None]
    pointers = weight_ptr + places[None] + (rows * stride_n)[:, None, None]
    return tl.load(pointers, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _gated(gated_ptr, token, choice, begins, held, inner: tl.constexpr, CHOICES: tl.constexpr, LOAD: tl.constexpr):
    columns = begins[:, None] + tl.arange(0, LOAD)[None, :]
    inside = held[:, None] & (columns < inner)
    return tl.load(gated_ptr + (token * CHOICES + choice)[:, None] * inner + columns, mask=inside, other=0.0)


@triton.jit
def _scale(scale_ptr, expert, begins, held, inner: tl.constexpr, stride_e, SCALE_K: tl.constexpr):
    return tl.load(scale_ptr + expert * stride_e + begins // SCALE_K, mask=held & (begins < inner), other=0.0)


@triton.jit
def down_kernel(
    gated_ptr, weight_ptr, scale_ptr, ids_ptr, topk_ptr, out_ptr, num_experts, H: tl.constexpr, inner: tl.constexpr,
    weight_stride_e, weight_stride_n: tl.constexpr, scale_stride_e, scale_stride_n,
    CHOICES: tl.constexpr, A: tl.constexpr, B: tl.constexpr, TOKENS_FASTEST: tl.constexpr, STEPS: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_I: tl.constexpr, LOAD: tl.constexpr,
    SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, EVEN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Choices in two parts of A and B (0: none): 8 and 4 waste one of 12 where 16 would waste five."""
    token = (tl.program_id(0) if TOKENS_FASTEST else tl.program_id(1)).to(tl.int64)
    part = tl.program_id(1) if TOKENS_FASTEST else tl.program_id(0)
    if PDL:
        tlc.gdc_launch_dependents()
    first = part * (STEPS * BLOCK_N)
    rows = first + tl.arange(0, BLOCK_N)
    choice_a, begins_a, expert_a, held_a, topk_a = _choices(
        ids_ptr, topk_ptr, token, num_experts, 0, A, CHOICES, BLOCK_I, LOAD
    )
    rows_a = _rows(
        weight_ptr, rows, expert_a, begins_a, held_a, H, inner, weight_stride_e, weight_stride_n, LOAD, EVEN
    )
    if B:
        choice_b, begins_b, expert_b, held_b, topk_b = _choices(
            ids_ptr, topk_ptr, token, num_experts, A, B, CHOICES, BLOCK_I, LOAD
        )
        rows_b = _rows(
            weight_ptr, rows, expert_b, begins_b, held_b, H, inner, weight_stride_e, weight_stride_n, LOAD, EVEN
        )
    if PDL:
        tlc.gdc_wait()
    gated_a = _gated(gated_ptr, token, choice_a, begins_a, held_a, inner, CHOICES, LOAD)
    if B:
        gated_b = _gated(gated_ptr, token, choice_b, begins_b, held_b, inner, CHOICES, LOAD)
    for step in tl.static_range(STEPS):
        row = (first + step * BLOCK_N) // SCALE_N * scale_stride_n
        here = rows + step * BLOCK_N
        scale_a = _scale(scale_ptr + row, expert_a, begins_a, held_a, inner, scale_stride_e, SCALE_K)
        sums_a = tl.sum(widened(rows_a) * gated_a.to(tl.float32)[None], axis=2)
        if B:
            scale_b = _scale(scale_ptr + row, expert_b, begins_b, held_b, inner, scale_stride_e, SCALE_K)
            sums_b = tl.sum(widened(rows_b) * gated_b.to(tl.float32)[None], axis=2)
        if step + 1 < STEPS:
            rows_a = _rows(
                weight_ptr, here + BLOCK_N, expert_a, begins_a, held_a, H, inner,
                weight_stride_e, weight_stride_n, LOAD, EVEN,
            )  # fmt: skip
            if B:
                rows_b = _rows(
                    weight_ptr, here + BLOCK_N, expert_b, begins_b, held_b, H, inner,
                    weight_stride_e, weight_stride_n, LOAD, EVEN,
                )  # fmt: skip
        result = tl.sum(sums_a * (topk_a * scale_a)[None], axis=1)
        if B:
            result += tl.sum(sums_b * (topk_b * scale_b)[None], axis=1)
        tl.store(out_ptr + token * H + here, result.to(out_ptr.dtype.element_ty), mask=here < H)


LOAD = 16


def gate_up(x, w13, s13, ids, out, *, lead, pairs_fastest=False, rows=4, warps=4, steps=1, stages=0, pdl=False,
            pdl_launch=None, by_warps=False, wide=True, two=False, **options):  # fmt: skip
    (tokens, choices), (experts, double, hidden) = ids.shape, w13.shape
    inner, pairs, blocks = double // 2, ids.numel(), s13.shape[1] // 2
    scale_n, scale_k = block_size(w13[:, :inner], s13[:, :blocks])
    parts = triton.cdiv(inner, rows * steps)
    grid = (pairs, parts) if pairs_fastest else (parts, pairs)
    codes, block_k = weight_codes(w13), triton.next_power_of_2(hidden)
    pdl_launch = pdl if pdl_launch is None else pdl_launch
    shared = {"SCAN": 256, "LEAD": lead, "PAIRS_FASTEST": pairs_fastest}
    shared |= {"STEPS": steps, "BLOCK_N": rows, "LOAD": LOAD, "SCALE_N": scale_n, "SCALE_K": scale_k, "PDL": pdl}
    shared |= {"EVEN": block_k == hidden and inner % (rows * steps) == 0, "num_warps": warps, **options}
    shared |= {"launch_pdl": True} if pdl_launch else {}
    assert scale_n % (rows * steps) == 0
    if by_warps:
        lanes = min(32, block_k // LOAD)
        gate_up_by_warps_kernel[grid](
            x, codes, s13, ids, out, pairs, experts, inner, hidden, x.stride(0),
            codes.stride(0), codes.stride(1), s13.stride(0), s13.stride(1), blocks * s13.stride(1),
            CHOICES=choices, CHUNKS=block_k // LOAD // lanes, LANES=lanes, WIDE=wide, **shared,
        )  # fmt: skip
        return
    if two:
        gate_up_two_kernel[grid](
            x, codes, s13, ids, out, pairs, experts, inner, hidden, x.stride(0),
            codes.stride(0), codes.stride(1), s13.stride(0), s13.stride(1), blocks * s13.stride(1),
            CHOICES=choices, BLOCK_K=block_k, OPAQUE=False, **shared,
        )  # fmt: skip
        return
    gate_up_kernel[grid](
        x, codes, s13, ids, out, pairs, experts, inner, hidden, x.stride(0),
        codes.stride(0), codes.stride(1), s13.stride(0), s13.stride(1), blocks * s13.stride(1),
        CHOICES=choices, STAGES=stages, BLOCK_K=block_k, **shared,
    )  # fmt: skip


def down(gated, w2, s2, ids, topk, out, *, parts=(8, 4), tokens_fastest=True, rows=4, warps=4, steps=1, pdl=False,
         **options):  # fmt: skip
    (tokens, choices), (experts, hidden, inner) = ids.shape, w2.shape
    assert choices <= sum(parts)
    scale_n, scale_k = block_size(w2, s2)
    count = triton.cdiv(hidden, rows * steps)
    grid = (tokens, count) if tokens_fastest else (count, tokens)
    codes, block_i = weight_codes(w2), triton.next_power_of_2(inner)
    down_kernel[grid](
        gated, codes, s2, ids, topk, out, experts, hidden, inner,
        codes.stride(0), codes.stride(1), s2.stride(0), s2.stride(1),
        CHOICES=choices, A=parts[0], B=parts[1], TOKENS_FASTEST=tokens_fastest, STEPS=steps, BLOCK_N=rows,
        BLOCK_I=block_i, LOAD=LOAD, SCALE_N=scale_n, SCALE_K=scale_k,
        EVEN=block_i == inner and hidden % (rows * steps) == 0, PDL=pdl, num_warps=warps,
        **({"launch_pdl": True} if pdl else {}), **options,
    )  # fmt: skip


def whole_rows(x, w13, w2, topk, ids, s13, s2, gate_up_options, down_options):
    gated = x.new_empty((ids.numel(), w2.shape[2]))
    out = torch.empty_like(x)
    gate_up(x, w13, s13, ids, gated, **gate_up_options)
    down(gated, w2, s2, ids, topk, out, **down_options)
    return out
