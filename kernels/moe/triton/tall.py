"""Grouped products of many rows an expert: FP8 blocks of 128x128 and rounded activations, up to three tiles a program.

A multiprocessor multiplies faster than the L2 cache brings it operands, so what counts is how often a weight is read:
a program takes up to three tiles of 64 rows of one expert and reads each of its weights once for all of them.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from ...dispatch import interpreting
from ...gemm.policy import weight_codes
from ...gemm.reference import FP8, FP8_MAX, GROUP
from ...gemm.triton import quantize_tokens, round_to_fp8
from ...integers import cdiv
from .align import HEIGHT, Tiles, align
from .combine import weighted_sum
from .tall_sum import shared_sum


@triton.jit
def _dot(a, w, UPCAST: tl.constexpr):
    if UPCAST:
        return tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    else:
        return tl.dot(a, w)


@triton.jit
def _product(
    a_ptr,
    a_scale_ptr,
    w_ptrs,
    w_row,
    w_scale_ptrs,
    pairs_ptr,
    num_pairs,
    K,
    a_stride,
    a_scale_stride,
    PAIRS_PER_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Sums of FIRST rows and of SECOND more (0: none) with the same weights, in float32 [rows, PARTS, columns]."""
    REST: tl.constexpr = SECOND if SECOND > 0 else 16
    ks = tl.arange(0, BLOCK_K)
    pairs = tl.load(pairs_ptr + tl.arange(0, FIRST))
    used = pairs < num_pairs
    rows = (pairs // PAIRS_PER_ROW).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * a_stride + ks[None, :]
    scale_ptrs = a_scale_ptr + rows * a_scale_stride
    acc = tl.zeros([FIRST, PARTS, BLOCK_N // PARTS], dtype=tl.float32)
    acc2 = tl.zeros([REST, PARTS, BLOCK_N // PARTS], dtype=tl.float32)
    if SECOND > 0:
        pairs2 = tl.load(pairs_ptr + FIRST + tl.arange(0, REST))
        used2 = pairs2 < num_pairs
        rows2 = (pairs2 // PAIRS_PER_ROW).to(tl.int64)
        a2_ptrs = a_ptr + rows2[:, None] * a_stride + ks[None, :]
        scale2_ptrs = a_scale_ptr + rows2 * a_scale_stride
    next_w = tl.load(w_scale_ptrs)
    next_a = tl.load(scale_ptrs, mask=used, other=0.0)
    if SECOND > 0:
        next_a2 = tl.load(scale2_ptrs, mask=used2, other=0.0)
    for group in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        k = group * BLOCK_K
        following = tl.minimum(group + 1, K // BLOCK_K - 1)
        if AHEAD == 0:
            w_factor = tl.load(w_scale_ptrs + group * BLOCK_K // GROUP)
            a_factor = tl.load(scale_ptrs + group, mask=used, other=0.0)
            if SECOND > 0:
                a_factor2 = tl.load(scale2_ptrs + group, mask=used2, other=0.0)
        else:
            w_factor, a_factor = next_w, next_a
            if SECOND > 0:
                a_factor2 = next_a2
        if AHEAD == 1:
            next_w = tl.load(w_scale_ptrs + following * BLOCK_K // GROUP)
            next_a = tl.load(scale_ptrs + following, mask=used, other=0.0)
            if SECOND > 0:
                next_a2 = tl.load(scale2_ptrs + following, mask=used2, other=0.0)
        w = tl.trans(w_ptrs.load([w_row, k])) if DESCRIBED else tl.load(w_ptrs + k)
        a = tl.load(a_ptrs + k, mask=used[:, None], other=0.0)
        if SECOND > 0:
            a2 = tl.load(a2_ptrs + k, mask=used2[:, None], other=0.0)
        part = _dot(a, w, UPCAST)
        if AHEAD == 2:
            # behind the fence at the first product, which waits for what was asked for before it
            next_w = tl.load(w_scale_ptrs + following * BLOCK_K // GROUP)
            next_a = tl.load(scale_ptrs + following, mask=used, other=0.0)
            if SECOND > 0:
                next_a2 = tl.load(scale2_ptrs + following, mask=used2, other=0.0)
        acc += tl.reshape(part, acc.shape) * (a_factor[:, None, None] * w_factor[None, :, None])
        if SECOND > 0:
            part = _dot(a2, w, UPCAST)
            acc2 += tl.reshape(part, acc2.shape) * (a_factor2[:, None, None] * w_factor[None, :, None])
    return acc, acc2


@triton.jit
def _halves(
    a_ptr,
    a_scale_ptr,
    w_ptrs,
    w_row,
    w_scale_ptr,
    second_offset,
    second_scale_offset,
    pairs_ptr,
    num_pairs,
    K,
    a_stride,
    a_scale_stride,
    PAIRS_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    GROUP: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """As `_product` for gate and up in two products: half the sums wait for their factors at a time."""
    ks = tl.arange(0, GROUP)
    pairs = tl.load(pairs_ptr + tl.arange(0, ROWS))
    used = pairs < num_pairs
    rows = (pairs // PAIRS_PER_ROW).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * a_stride + ks[None, :]
    scale_ptrs = a_scale_ptr + rows * a_scale_stride
    gate = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    up = tl.zeros([ROWS, WIDTH], dtype=tl.float32)
    next_a = tl.load(scale_ptrs, mask=used, other=0.0)
    next_gate, next_up = tl.load(w_scale_ptr), tl.load(w_scale_ptr + second_scale_offset)
    for group in tl.range(0, K // GROUP, num_stages=STAGES):
        k = group * GROUP
        following = tl.minimum(group + 1, K // GROUP - 1)
        if AHEAD == 0:
            next_a = tl.load(scale_ptrs + group, mask=used, other=0.0)
            next_gate = tl.load(w_scale_ptr + group)
            next_up = tl.load(w_scale_ptr + second_scale_offset + group)
        gate_factor, up_factor = next_a * next_gate, next_a * next_up
        if AHEAD == 1:
            next_a = tl.load(scale_ptrs + following, mask=used, other=0.0)
            next_gate = tl.load(w_scale_ptr + following)
            next_up = tl.load(w_scale_ptr + second_scale_offset + following)
        a = tl.load(a_ptrs + k, mask=used[:, None], other=0.0)
        w = tl.trans(w_ptrs.load([w_row, k])) if DESCRIBED else tl.load(w_ptrs + k)
        w2 = tl.trans(w_ptrs.load([w_row + second_offset, k])) if DESCRIBED else tl.load(w_ptrs + second_offset + k)
        part = _dot(a, w, UPCAST)
        if AHEAD == 2:
            next_a = tl.load(scale_ptrs + following, mask=used, other=0.0)
            next_gate = tl.load(w_scale_ptr + following)
            next_up = tl.load(w_scale_ptr + second_scale_offset + following)
        gate += part * gate_factor[:, None]
        up += _dot(a, w2, UPCAST) * up_factor[:, None]
    return gate, up


@triton.jit
def _finish(
    acc,
    acc2,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    column,
    num_pairs,
    N,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PARTS: tl.constexpr,
    OUT_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Write a tile's sums, or silu(gate) * up of its two parts, which may be one group to round."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    if SPLIT:
        values = acc * tl.sigmoid(acc) * acc2
    elif PARTS == 2:
        gate, up = tl.split(tl.permute(acc, (0, 2, 1)))
        values = gate * tl.sigmoid(gate) * up
    else:
        values = tl.reshape(acc, [ROWS, BLOCK_N])
    pairs = tl.load(pairs_ptr + tl.arange(0, ROWS)).to(tl.int64)
    used = pairs < num_pairs
    cols = column * WIDTH + tl.arange(0, WIDTH)
    if OUT_FP8:
        values, factor = round_to_fp8(values, FP8_MAX, UPCAST)
        tl.store(out_scale_ptr + pairs * (N // WIDTH) + column, factor, mask=used)
    tl.store(out_ptr + pairs[:, None] * N + cols[None, :], values.to(out_ptr.dtype.element_ty), mask=used[:, None])


@triton.jit
def _tile(
    a_ptr,
    a_scale_ptr,
    w_ptrs,
    w_row,
    w_scale_ptrs,
    second_offset,
    second_scale_offset,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    column,
    num_pairs,
    N,
    K,
    a_stride,
    a_scale_stride,
    PAIRS_PER_ROW: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    if SPLIT:
        acc, acc2 = _halves(
            a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second_offset, second_scale_offset, pairs_ptr, num_pairs,
            K, a_stride, a_scale_stride, PAIRS_PER_ROW, FIRST, BLOCK_N // PARTS, GROUP, AHEAD, STAGES, DESCRIBED,
            UPCAST,
        )  # fmt: skip
    else:
        acc, acc2 = _product(
            a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, pairs_ptr, num_pairs, K, a_stride, a_scale_stride,
            PAIRS_PER_ROW, FIRST, SECOND, PARTS, BLOCK_N, BLOCK_K, GROUP, AHEAD, STAGES, DESCRIBED, UPCAST,
        )  # fmt: skip
    _finish(
        acc, acc2, out_ptr, out_scale_ptr, pairs_ptr, column, num_pairs, N,
        FIRST, BLOCK_N, PARTS, OUT_FP8, FP8_MAX, SPLIT, UPCAST,
    )  # fmt: skip
    if SECOND > 0:
        _finish(
            acc2, acc2, out_ptr, out_scale_ptr, pairs_ptr + FIRST, column, num_pairs, N,
            SECOND, BLOCK_N, PARTS, OUT_FP8, FP8_MAX, SPLIT, UPCAST,
        )  # fmt: skip


@triton.jit
def _group(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    packed,
    expert,
    column,
    num_pairs,
    N,
    K,
    a_stride,
    a_scale_stride,
    w_stride_e,
    w_stride_n,
    w_scale_stride_e,
    w_scale_stride_n,
    PAIRS_PER_ROW: tl.constexpr,
    MOST: tl.constexpr,
    HEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """BLOCK_N / PARTS columns of one group of tiles."""
    WIDTH: tl.constexpr = BLOCK_N // PARTS
    tile, count = packed // 4, packed % 4
    if SPLIT:
        w_rows = column * WIDTH + tl.arange(0, WIDTH)
        parts = column * WIDTH // GROUP
    else:
        local = tl.arange(0, BLOCK_N)
        w_rows = (local // WIDTH) * N + column * WIDTH + local % WIDTH
        parts = tl.arange(0, PARTS) * (N // GROUP) + column * WIDTH // GROUP
    w_row = expert.to(tl.int32) * PARTS * N + column * WIDTH
    if DESCRIBED:
        w_ptrs = w_ptr
    else:
        w_ptrs = w_ptr + expert * w_stride_e + w_rows[None, :] * w_stride_n + tl.arange(0, BLOCK_K)[:, None]
    w_scale_ptrs = w_scale_ptr + expert * w_scale_stride_e + parts * w_scale_stride_n
    tile_pairs = pairs_ptr + tile.to(tl.int64) * HEIGHT
    second = N if DESCRIBED else N * w_stride_n
    second_scale = N // GROUP * w_scale_stride_n
    if SPLIT:
        if count >= 2:
            _tile(
                a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second, second_scale, out_ptr, out_scale_ptr,
                tile_pairs, column, num_pairs, N, K, a_stride, a_scale_stride, PAIRS_PER_ROW, 2 * HEIGHT, 0, PARTS,
                BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES, DESCRIBED, SPLIT, UPCAST,
            )  # fmt: skip
        if count != 2:
            _tile(
                a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second, second_scale, out_ptr, out_scale_ptr,
                tile_pairs + (count - 1) * HEIGHT,
                column, num_pairs, N, K, a_stride, a_scale_stride, PAIRS_PER_ROW, HEIGHT, 0, PARTS,
                BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES, DESCRIBED, SPLIT, UPCAST,
            )  # fmt: skip
    elif MOST >= 3 and count == 3:
        _tile(
            a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second, second_scale, out_ptr, out_scale_ptr, tile_pairs,
            column, num_pairs, N, K, a_stride, a_scale_stride, PAIRS_PER_ROW, LOW, 3 * HEIGHT - LOW, PARTS,
            BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES, DESCRIBED, SPLIT, UPCAST,
        )  # fmt: skip
    elif MOST >= 2 and count == 2:
        _tile(
            a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second, second_scale, out_ptr, out_scale_ptr, tile_pairs,
            column, num_pairs, N, K, a_stride, a_scale_stride, PAIRS_PER_ROW, LOW, 2 * HEIGHT - LOW, PARTS,
            BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES, DESCRIBED, SPLIT, UPCAST,
        )  # fmt: skip
    else:
        _tile(
            a_ptr, a_scale_ptr, w_ptrs, w_row, w_scale_ptrs, second, second_scale, out_ptr, out_scale_ptr, tile_pairs,
            column, num_pairs, N, K, a_stride, a_scale_stride, PAIRS_PER_ROW, HEIGHT, 0, PARTS,
            BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES, DESCRIBED, SPLIT, UPCAST,
        )  # fmt: skip


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs", "max_groups"])
def _tall_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    out_scale_ptr,
    pairs_ptr,
    groups_ptr,
    num_pairs,
    max_groups,
    N,
    K,
    a_stride,
    a_scale_stride,
    w_stride_e,
    w_stride_n,
    w_scale_stride_e,
    w_scale_stride_n,
    PAIRS_PER_ROW: tl.constexpr,
    MOST: tl.constexpr,
    HEIGHT: tl.constexpr,
    LOW: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    OUT_FP8: tl.constexpr,
    FP8_MAX: tl.constexpr,
    AHEAD: tl.constexpr,
    STAGES: tl.constexpr,
    DESCRIBED: tl.constexpr,
    WALKS: tl.constexpr,
    BUT_LAST: tl.constexpr,
    SPLIT: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[p, n] = a[p // PAIRS_PER_ROW] . w[expert of p, n], or (PARTS 2) silu of it times the second half's product.

    A program takes one group of tiles and BLOCK_N / PARTS columns, or (WALKS) one after another in the same order:
    column tiles vary fastest, so that the programs of one expert share its rows in the L2 cache.
    """
    columns = N // (BLOCK_N // PARTS)
    used = tl.load(groups_ptr + 2 * max_groups + BUT_LAST)
    if WALKS:
        for item in tl.range(tl.program_id(0), used * columns, tl.num_programs(0), num_stages=1):
            packed = tl.load(groups_ptr + item // columns)
            expert = tl.load(groups_ptr + max_groups + item // columns).to(tl.int64)
            column = item % columns
            _group(
                a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, out_scale_ptr, pairs_ptr, packed, expert, column,
                num_pairs, N, K, a_stride, a_scale_stride, w_stride_e, w_stride_n, w_scale_stride_e, w_scale_stride_n,
                PAIRS_PER_ROW, MOST, HEIGHT, LOW, PARTS, BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES,
                DESCRIBED, SPLIT, UPCAST,
            )  # fmt: skip
    else:
        group, column = tl.program_id(0) // columns, tl.program_id(0) % columns
        packed = tl.load(groups_ptr + group)  # beside `used`, not behind it
        expert = tl.load(groups_ptr + max_groups + group).to(tl.int64)
        if group < used:
            _group(
                a_ptr, a_scale_ptr, w_ptr, w_scale_ptr, out_ptr, out_scale_ptr, pairs_ptr, packed, expert, column,
                num_pairs, N, K, a_stride, a_scale_stride, w_stride_e, w_stride_n, w_scale_stride_e, w_scale_stride_n,
                PAIRS_PER_ROW, MOST, HEIGHT, LOW, PARTS, BLOCK_N, BLOCK_K, GROUP, OUT_FP8, FP8_MAX, AHEAD, STAGES,
                DESCRIBED, SPLIT, UPCAST,
            )  # fmt: skip


@dataclass(frozen=True)
class TallTile:
    """A product's tile: rows of the weight (gate's and up's together), warps and pipeline stages.

    low: rows of the first of a program's two products, 64 or 128, where a group has as many; split: gate and up in two
    products; ahead: factors are asked for at their use (0), a step before it (1), there behind the first product (2),
    or with codes (3); described: weights come by tensor descriptors (joined gate and up cannot); walks: programs that
    take one group after another (0: a program each); registers: at most so many a thread.
    """

    block_n: int
    num_warps: int
    num_stages: int
    low: int = 2 * HEIGHT
    split: bool = False
    walks: int = 0
    ahead: int = 1
    described: bool = False
    registers: int | None = None


def tall_product(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    tiles: Tiles,
    out: torch.Tensor,
    out_scale: torch.Tensor | None = None,
    *,
    pairs_per_row: int,
    swiglu: bool,
    tile: TallTile,
    but_last: bool = False,
) -> None:
    """Fill out [pairs, N] from codes a [pairs / pairs_per_row, K] and weight [E, N or 2N, K], both FP8.

    a_scale's columns say how many of a's share a factor. out may take codes, with out_scale [pairs, N / columns of a
    tile]. tiles must have groups. but_last: the last expert's pairs are left out.
    """
    assert tiles.groups is not None
    num_pairs, N = out.shape
    parts = 2 if swiglu else 1
    codes = weight_codes(weight)
    if tile.described:
        assert weight.is_contiguous() and (parts == 1 or tile.split)
        codes = TensorDescriptor.from_tensor(codes.view(-1, codes.shape[2]), [tile.block_n // parts, GROUP])
    items = tiles.max_groups * cdiv(N * parts, tile.block_n)
    _tall_kernel[(min(tile.walks, items) if tile.walks else items,)](
        a,
        a_scale,
        codes,
        scale,
        out,
        out if out_scale is None else out_scale,
        tiles.pairs,
        tiles.groups,
        num_pairs,
        tiles.max_groups,
        N,
        a.shape[1],
        a.stride(0),
        a_scale.stride(0),
        weight.stride(0),
        weight.stride(1),
        scale.stride(0),
        scale.stride(1),
        PAIRS_PER_ROW=pairs_per_row,
        MOST=tiles.most,
        HEIGHT=tiles.block_m,
        LOW=tile.low,
        PARTS=parts,
        BLOCK_N=tile.block_n,
        BLOCK_K=a.shape[1] // a_scale.shape[1],
        GROUP=GROUP,
        OUT_FP8=out_scale is not None,
        FP8_MAX=FP8_MAX,
        AHEAD=tile.ahead % 3,
        STAGES=tile.num_stages if tile.ahead == 3 else None,
        DESCRIBED=tile.described,
        WALKS=tile.walks > 0,
        BUT_LAST=but_last,
        SPLIT=tile.split,
        UPCAST=interpreting() and not a.is_cuda,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
        **({} if tile.registers is None else {"maxnreg": tile.registers}),
    )


@dataclass(frozen=True)
class TallForm:
    """Both products' tiles, the most tiles of a group and their height, and whether gate-up rounds what it writes."""

    most: int
    gate_up: TallTile
    down: TallTile
    rounds: bool
    height: int = HEIGHT
    shared_in_sum: bool = False  # the last expert's down product in the weighted sum: it is every token's last choice


def fused_moe_tall(
    form: TallForm,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; the arguments are taken as checked, weights as FP8 blocks of 128x128."""
    (tokens, hidden), top_k, num_experts, inner = x.shape, topk_ids.shape[1], w2.shape[0], w2.shape[2]
    pairs = tokens * top_k
    tiles, _ = align(topk_ids, num_experts, form.height, form.most)
    codes, scale = quantize_tokens(x)
    activated = x.new_empty((pairs, inner), dtype=FP8 if form.rounds else x.dtype)
    factors = None
    if form.rounds:
        factors = x.new_empty((pairs, 2 * inner // form.gate_up.block_n), dtype=torch.float32)
    tall_product(
        codes, scale, w13, w13_scale, tiles, activated, factors, pairs_per_row=top_k, swiglu=True, tile=form.gate_up
    )
    if factors is None:
        activated, factors = quantize_tokens(activated)
    values = x.new_empty((pairs, hidden))
    tall_product(
        activated, factors, w2, w2_scale, tiles, values,
        pairs_per_row=1, swiglu=False, tile=form.down, but_last=form.shared_in_sum,
    )  # fmt: skip
    out = torch.empty_like(x)
    if form.shared_in_sum:
        shared_sum(activated, factors, w2, w2_scale, values, topk_weights, topk_ids, out)
    else:
        weighted_sum(values, None, topk_weights, topk_ids, num_experts, out)
    return out
