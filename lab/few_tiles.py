"""Tiles of pairs for a few tokens, new: FP8 products whose launches begin early, and a down product that rounds itself."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda as tlc

from qwen3next_plugin.kernels.dispatch import interpreting
from qwen3next_plugin.kernels.gemm.policy import weight_codes
from qwen3next_plugin.kernels.gemm.reference import FP8, FP8_MAX, GROUP
from qwen3next_plugin.kernels.gemm.triton import round_to_fp8, round_tokens


@triton.jit(do_not_specialize=["num_pairs", "num_tokens"])
def apart_kernel(
    ids_ptr, pairs_ptr, experts_ptr, x_ptr, codes_ptr, factors_ptr, num_pairs, num_experts, num_tokens, K, num_groups,
    x_stride, BLOCK_M: tl.constexpr, SCAN: tl.constexpr, FP8_MAX: tl.constexpr, GROUP: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """As `apart._apart_kernel`, but that the next launch may begin at once."""
    if PDL:
        tlc.gdc_wait()
        tlc.gdc_launch_dependents()
    program = tl.program_id(0)
    if program < num_pairs:
        lanes = tl.arange(0, SCAN)
        expert = tl.load(ids_ptr + program)
        mine = tl.load(ids_ptr + lanes, mask=lanes < num_pairs, other=-1) == expert
        before = tl.sum((mine & (lanes < program)).to(tl.int32), axis=0)
        begins = (expert >= 0) & (expert < num_experts) & (before % BLOCK_M == 0)
        tl.store(experts_ptr + program, tl.where(begins, expert, -1))
        if begins:
            places = tl.cumsum(mine.to(tl.int32), axis=0) - 1 - before
            mine = mine & (places >= 0) & (places < BLOCK_M)
            tile = pairs_ptr + program * BLOCK_M
            tl.store(tile + places, lanes, mask=mine)
            padding = tl.arange(0, BLOCK_M)
            tl.store(tile + padding, num_pairs, mask=padding >= tl.sum(mine.to(tl.int32), axis=0))
    if program >= num_pairs:
        row = (program - num_pairs) // num_groups + tl.arange(0, 1)
        round_tokens(
            x_ptr, codes_ptr, factors_ptr, row.to(tl.int64), (program - num_pairs) % num_groups, num_tokens, K,
            num_groups, x_stride, FP8_MAX, GROUP, INTERPRETED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs"])
def gate_up_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, out_scale_ptr, pairs_ptr, experts_ptr, num_pairs,
    N: tl.constexpr, K: tl.constexpr, w_stride_e, w_stride_n: tl.constexpr, w_scale_stride_e, w_scale_stride_n,
    up_scale_offset, CHOICES: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    SCALE_N: tl.constexpr, LAST_FIRST: tl.constexpr, OUT_FP8: tl.constexpr, FP8_MAX: tl.constexpr,
    INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """FP8 x [T, K] by its pairs' experts; N and K are multiples of the tile's, which lies in one block of factors."""
    if PDL:
        tlc.gdc_wait()
        tlc.gdc_launch_dependents()
    tile = tl.program_id(1)
    if LAST_FIRST:  # as in few_rows: the last choices' tiles come first
        tokens = num_pairs // CHOICES
        tile = tile % tokens * CHOICES + CHOICES - 1 - tile // tokens
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))  # not after a look at the expert
    if expert >= 0:
        used = pairs < num_pairs
        rows = (pairs // CHOICES).to(tl.int64)
        first = tl.program_id(0) * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        ks = tl.arange(0, BLOCK_K)
        a_ptrs = a_ptr + rows[:, None] * K + ks[None, :]
        a_scale_ptrs = a_scale_ptr + rows * (K // BLOCK_K)
        w_ptrs = w_ptr + expert * w_stride_e + cols[None, :] * w_stride_n + ks[:, None]
        factors = w_scale_ptr + expert * w_scale_stride_e + first // SCALE_N * w_scale_stride_n
        gate = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        up = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(K // BLOCK_K):
            a = tl.load(a_ptrs + k * BLOCK_K, mask=used[:, None], other=0.0)
            w1 = tl.load(w_ptrs + k * BLOCK_K)
            w2 = tl.load(w_ptrs + N * w_stride_n + k * BLOCK_K)
            a_factor = tl.load(a_scale_ptrs + k, mask=used, other=0.0)[:, None]
            if INTERPRETED:
                a, w1, w2 = a.to(tl.float32), w1.to(tl.float32), w2.to(tl.float32)
            gate += tl.dot(a, w1) * (a_factor * tl.load(factors + k))
            up += tl.dot(a, w2) * (a_factor * tl.load(factors + up_scale_offset + k))
        out = gate * tl.sigmoid(gate) * up
        if OUT_FP8:
            out, factor = round_to_fp8(out, FP8_MAX, INTERPRETED)
            tl.store(out_scale_ptr + pairs * (N // BLOCK_N) + tl.program_id(0), factor, mask=used)
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(out_ptrs, out.to(out_ptr.dtype.element_ty), mask=used[:, None])


@triton.jit
def _weights(w_ptr, expert, cols, k, w_stride_e, w_stride_n: tl.constexpr, GROUP: tl.constexpr):
    ks = k * GROUP + tl.arange(0, GROUP)
    return tl.load(w_ptr + expert * w_stride_e + cols[None, :] * w_stride_n + ks[:, None])


@triton.jit
def _times(acc, a_ptr, a_scale_ptr, pairs, used, k, w, w_factor,
           K: tl.constexpr, GROUP: tl.constexpr, A_FP8: tl.constexpr, FP8_MAX: tl.constexpr, INTERPRETED: tl.constexpr):  # fmt: skip
    ks = k * GROUP + tl.arange(0, GROUP)
    a = tl.load(a_ptr + pairs.to(tl.int64)[:, None] * K + ks[None, :], mask=used[:, None], other=0.0)
    if A_FP8:
        factor = tl.load(a_scale_ptr + pairs * (K // GROUP) + k, mask=used, other=0.0)
    else:
        values, factor = round_to_fp8(a.to(tl.float32), FP8_MAX, INTERPRETED)
        a = values.to(w.dtype)
    if INTERPRETED:
        a, w = a.to(tl.float32), w.to(tl.float32)
    return acc + tl.dot(a, w) * (factor * w_factor)[:, None]


@triton.jit(do_not_specialize=["num_pairs"])
def down_held_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, pairs_ptr, experts_ptr, num_pairs, N: tl.constexpr, K: tl.constexpr,
    w_stride_e, w_stride_n: tl.constexpr, w_scale_stride_e, w_scale_stride_n, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, A_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Four or eight groups of K: a tile's weights are asked for at once, and before the last launch has ended."""
    if PDL:
        tlc.gdc_launch_dependents()
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert >= 0:
        first = tl.program_id(0) * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        w0 = _weights(w_ptr, expert, cols, 0, w_stride_e, w_stride_n, GROUP)
        w1 = _weights(w_ptr, expert, cols, 1, w_stride_e, w_stride_n, GROUP)
        w2 = _weights(w_ptr, expert, cols, 2, w_stride_e, w_stride_n, GROUP)
        w3 = _weights(w_ptr, expert, cols, 3, w_stride_e, w_stride_n, GROUP)
        if K // GROUP == 8:
            w4 = _weights(w_ptr, expert, cols, 4, w_stride_e, w_stride_n, GROUP)
            w5 = _weights(w_ptr, expert, cols, 5, w_stride_e, w_stride_n, GROUP)
            w6 = _weights(w_ptr, expert, cols, 6, w_stride_e, w_stride_n, GROUP)
            w7 = _weights(w_ptr, expert, cols, 7, w_stride_e, w_stride_n, GROUP)
        factors = w_scale_ptr + expert * w_scale_stride_e + first // SCALE_N * w_scale_stride_n
        pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        used = pairs < num_pairs
        if PDL:
            tlc.gdc_wait()
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 0, w0, tl.load(factors + 0 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 1, w1, tl.load(factors + 1 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 2, w2, tl.load(factors + 2 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 3, w3, tl.load(factors + 3 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        if K // GROUP == 8:
            acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 4, w4, tl.load(factors + 4 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
            acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 5, w5, tl.load(factors + 5 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
            acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 6, w6, tl.load(factors + 6 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
            acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, 7, w7, tl.load(factors + 7 * GROUP // SCALE_K), K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=used[:, None])


@triton.jit(do_not_specialize=["num_pairs"])
def down_kernel(
    a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, pairs_ptr, experts_ptr, num_pairs, N: tl.constexpr, K: tl.constexpr,
    w_stride_e, w_stride_n: tl.constexpr, w_scale_stride_e, w_scale_stride_n, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, SCALE_N: tl.constexpr, SCALE_K: tl.constexpr, GROUP: tl.constexpr, A_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr, INTERPRETED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """In a loop over groups of K, pipelined."""
    if PDL:
        tlc.gdc_launch_dependents()
    tile = tl.program_id(1)
    expert = tl.load(experts_ptr + tile).to(tl.int64)
    if expert >= 0:
        first = tl.program_id(0) * BLOCK_N
        cols = first + tl.arange(0, BLOCK_N)
        factors = w_scale_ptr + expert * w_scale_stride_e + first // SCALE_N * w_scale_stride_n
        pairs = tl.load(pairs_ptr + tile * BLOCK_M + tl.arange(0, BLOCK_M))
        used = pairs < num_pairs
        if PDL:
            tlc.gdc_wait()
        acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
        for k in range(K // GROUP):
            w = _weights(w_ptr, expert, cols, k, w_stride_e, w_stride_n, GROUP)
            factor = tl.load(factors + k * GROUP // SCALE_K)
            acc = _times(acc, a_ptr, a_scale_ptr, pairs, used, k, w, factor, K, GROUP, A_FP8, FP8_MAX, INTERPRETED)
        out_ptrs = out_ptr + pairs.to(tl.int64)[:, None] * N + cols[None, :]
        tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=used[:, None])


@triton.jit
def sum_kernel(
    values_ptr, weights_ptr, ids_ptr, out_ptr, H: tl.constexpr, num_experts,
    CHOICES: tl.constexpr, BLOCK_H: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    if PDL:
        tlc.gdc_launch_dependents()
        tlc.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for choice in tl.static_range(CHOICES):
        expert = tl.load(ids_ptr + token * CHOICES + choice)
        held = (expert >= 0) & (expert < num_experts)
        weight = tl.load(weights_ptr + token * CHOICES + choice)
        value = tl.load(values_ptr + (token * CHOICES + choice) * H + cols, mask=cols < tl.where(held, H, 0), other=0.0)
        total += tl.where(held, weight, 0.0) * value.to(tl.float32)
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=cols < H)


BLOCK_M = 16


def early(pdl):
    return {"launch_pdl": True} if pdl else {}


def tiles_apart(ids, experts, x, *, pdl, first_pdl=False):
    (tokens, hidden), pairs = x.shape, ids.numel()
    tile_pairs, tile_experts = ids.new_empty(pairs * BLOCK_M), ids.new_empty(pairs)
    codes, factors = x.new_empty(x.shape, dtype=FP8), x.new_empty((tokens, hidden // GROUP), dtype=torch.float32)
    apart_kernel[(pairs + tokens * (hidden // GROUP),)](
        ids, tile_pairs, tile_experts, x, codes, factors, pairs, experts, tokens, hidden, hidden // GROUP, x.stride(0),
        BLOCK_M=BLOCK_M, SCAN=256, FP8_MAX=FP8_MAX, GROUP=GROUP, INTERPRETED=interpreting() and not x.is_cuda,
        PDL=pdl, num_warps=1, **early(pdl and first_pdl),
    )  # fmt: skip
    return tile_pairs, tile_experts, codes, factors


def gate_up(codes, factors, w13, s13, tiles, tile_experts, choices, *, cols=64, warps=4, stages=4, pdl=False, fp8=False,
            last_first=True, dtype=torch.bfloat16, **options):  # fmt: skip
    pairs, (experts, double, hidden) = tile_experts.numel(), w13.shape
    inner = double // 2
    out = torch.empty((pairs, inner), dtype=FP8 if fp8 else dtype, device=codes.device)
    scale = torch.empty((pairs, inner // cols), dtype=torch.float32, device=codes.device) if fp8 else factors
    w = weight_codes(w13)
    gate_up_kernel[(inner // cols, pairs)](
        codes, factors, w, s13, out, scale, tiles, tile_experts, pairs, inner, hidden, w.stride(0), w.stride(1),
        s13.stride(0), s13.stride(1), s13.shape[1] // 2 * s13.stride(1), CHOICES=choices, BLOCK_M=BLOCK_M, BLOCK_N=cols,
        BLOCK_K=GROUP, SCALE_N=GROUP, LAST_FIRST=last_first, OUT_FP8=fp8, FP8_MAX=FP8_MAX,
        INTERPRETED=interpreting() and not codes.is_cuda, PDL=pdl, num_warps=warps, num_stages=stages, **early(pdl),
        **options,
    )  # fmt: skip
    return out, scale


def down(a, scale, w2, s2, tiles, tile_experts, *, held=False, group=GROUP, cols=64, warps=4, stages=4, pdl=False,
         dtype=torch.bfloat16, **options):  # fmt: skip
    pairs, (experts, hidden, inner) = tile_experts.numel(), w2.shape
    out = torch.empty((pairs, hidden), dtype=dtype, device=a.device)
    w = weight_codes(w2)
    kernel = down_held_kernel if held else down_kernel
    assert not held or inner // group in (4, 8)
    kernel[(hidden // cols, pairs)](
        a, scale, w, s2, out, tiles, tile_experts, pairs, hidden, inner, w.stride(0), w.stride(1), s2.stride(0),
        s2.stride(1), BLOCK_M=BLOCK_M, BLOCK_N=cols, SCALE_N=GROUP, SCALE_K=GROUP, GROUP=group, A_FP8=a.dtype is FP8, FP8_MAX=FP8_MAX,
        INTERPRETED=interpreting() and not a.is_cuda, PDL=pdl, num_warps=warps, num_stages=stages, **early(pdl),
        **options,
    )  # fmt: skip
    return out


def summed(values, topk, ids, experts, *, pdl, block=512):
    (tokens, choices), hidden = ids.shape, values.shape[1]
    out = values.new_empty((tokens, hidden))
    block = min(block, triton.next_power_of_2(hidden))
    sum_kernel[(tokens, triton.cdiv(hidden, block))](
        values, topk, ids, out, hidden, experts, CHOICES=choices, BLOCK_H=block, PDL=pdl, num_warps=2, **early(pdl)
    )
    return out


def tiled(x, w13, w2, topk, ids, s13, s2, *, pdl=False, first_pdl=False, up=(), dn=()):
    """Four launches (or five): tiles and rounding, gate-up, (none: down rounds), down, sum."""
    up, dn = dict(up), dict(dn)
    tiles, tile_experts, codes, factors = tiles_apart(ids, w13.shape[0], x, pdl=pdl, first_pdl=first_pdl)
    a, scale = gate_up(codes, factors, w13, s13, tiles, tile_experts, ids.shape[1], pdl=pdl, dtype=x.dtype, **up)
    values = down(a, scale, w2, s2, tiles, tile_experts, pdl=pdl, dtype=x.dtype, **dn)
    return summed(values, topk, ids, w13.shape[0], pdl=pdl)


def hybrid(x, w13, w2, topk, ids, s13, s2, *, pdl=False, first_pdl=False, up=(), dn=()):
    """Three launches: tiles and rounding, gate-up in tiles, down by whole rows, which sums."""
    import few_rows

    up, dn = dict(up), dict(dn)
    tiles, tile_experts, codes, factors = tiles_apart(ids, w13.shape[0], x, pdl=pdl, first_pdl=first_pdl)
    a, _ = gate_up(codes, factors, w13, s13, tiles, tile_experts, ids.shape[1], pdl=pdl, dtype=x.dtype, **up)
    out = torch.empty_like(x)
    few_rows.down(a, w2, s2, ids, topk, out, pdl=pdl, **dn)
    return out
