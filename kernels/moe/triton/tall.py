"""Experts of many tokens: FP8 blocks of 128x128 and rounded activations, in products that wait less for operands.

Gate's and up's columns are one product, so that a program waits for one where it waited for two. A program of down
reads its weights once for up to 128 rows. The factors of a step are asked for as early as its codes: a loop with stages
of its own brings whatever it loads ahead of time, one without only what a product takes.

When and in which tiles is `..tall_rule`'s to say. Sums are those of `experts`, in the same order.
"""

import torch
import triton
import triton.language as tl

from ...dispatch import interpreting
from ...gemm.reference import GROUP
from ...gemm.triton import quantize_tokens
from ..config import Tile
from ..tall_rule import TILES
from .align import Tiles, align
from .combine import weighted_sum

_HEIGHT = 2 * TILES.block_m  # of the tiles that pairs are sorted into


@triton.jit
def _added(acc, a, w, a_factor, w_factor, UPCAST: tl.constexpr):
    """acc [rows, parts, columns] and the product of a step, each part of whose columns has a factor."""
    if UPCAST:
        part = tl.dot(a.to(tl.float32), w.to(tl.float32), input_precision="ieee")
    else:
        part = tl.dot(a, w)
    return acc + tl.reshape(part, acc.shape) * (a_factor[:, None, None] * w_factor[None, :, None])


@triton.jit
def _sums(
    a_ptr,
    a_scale_ptr,
    w_ptrs,
    w_scale_ptrs,
    pairs_ptr,
    num_pairs,
    K,
    a_stride,
    a_scale_stride,
    PAIRS_PER_ROW: tl.constexpr,
    ROWS: tl.constexpr,
    TWICE: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Float32 sums [ROWS, PARTS, columns], and (TWICE) those of as many rows more with the same weights."""
    ks = tl.arange(0, BLOCK_K)
    pairs = tl.load(pairs_ptr + tl.arange(0, ROWS))
    used = pairs < num_pairs
    rows = (pairs // PAIRS_PER_ROW).to(tl.int64)
    a_ptrs = a_ptr + rows[:, None] * a_stride + ks[None, :]
    scale_ptrs = a_scale_ptr + rows * a_scale_stride
    acc = tl.zeros([ROWS, PARTS, BLOCK_N // PARTS], dtype=tl.float32)
    acc2 = tl.zeros([ROWS, PARTS, BLOCK_N // PARTS], dtype=tl.float32)
    if TWICE:
        pairs2 = tl.load(pairs_ptr + ROWS + tl.arange(0, ROWS))
        used2 = pairs2 < num_pairs
        rows2 = (pairs2 // PAIRS_PER_ROW).to(tl.int64)
        a2_ptrs = a_ptr + rows2[:, None] * a_stride + ks[None, :]
        scale2_ptrs = a_scale_ptr + rows2 * a_scale_stride
    for group in tl.range(0, K // BLOCK_K, num_stages=STAGES):
        w_factor = tl.load(w_scale_ptrs + group)
        a_factor = tl.load(scale_ptrs + group, mask=used, other=0.0)
        w = tl.load(w_ptrs + group * BLOCK_K)
        a = tl.load(a_ptrs + group * BLOCK_K, mask=used[:, None], other=0.0)
        if TWICE:
            a_factor2 = tl.load(scale2_ptrs + group, mask=used2, other=0.0)
            a2 = tl.load(a2_ptrs + group * BLOCK_K, mask=used2[:, None], other=0.0)
        acc = _added(acc, a, w, a_factor, w_factor, UPCAST)
        if TWICE:
            acc2 = _added(acc2, a2, w, a_factor2, w_factor, UPCAST)
    return acc, acc2


@triton.jit
def _write(acc, out_ptr, pairs_ptr, column, num_pairs, N, PARTS: tl.constexpr):
    """Rows of sums, or silu(gate) * up of their two parts."""
    ROWS: tl.constexpr = acc.shape[0]
    WIDTH: tl.constexpr = acc.shape[2]
    if PARTS == 2:
        gate, up = tl.split(tl.permute(acc, (0, 2, 1)))
        values = gate * tl.sigmoid(gate) * up
    else:
        values = tl.reshape(acc, [ROWS, WIDTH])
    pairs = tl.load(pairs_ptr + tl.arange(0, ROWS)).to(tl.int64)
    cols = column * WIDTH + tl.arange(0, WIDTH)
    places = out_ptr + pairs[:, None] * N + cols[None, :]
    tl.store(places, values.to(out_ptr.dtype.element_ty), mask=(pairs < num_pairs)[:, None])


# A step's number of pairs is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs"])
def _tall_kernel(
    a_ptr,
    a_scale_ptr,
    w_ptr,
    w_scale_ptr,
    out_ptr,
    pairs_ptr,
    experts_ptr,
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
    HEIGHT: tl.constexpr,
    ROWS: tl.constexpr,
    TWO: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """out[p, n] = a[p // PAIRS_PER_ROW] . w[expert of p, n], or (PARTS 2) silu of it times the second half's product.

    A program takes BLOCK_N / PARTS columns of ROWS rows, or (TWO) of as many more too, of a tile of HEIGHT rows.
    """
    # column tiles vary fastest: the programs of one expert run together and share its rows in the L2 cache
    column = tl.program_id(0)
    begin = tl.program_id(1) * (2 * ROWS if TWO else ROWS)
    pairs_ptr += begin.to(tl.int64)
    expert = tl.load(experts_ptr + begin // HEIGHT).to(tl.int64)
    first = tl.load(pairs_ptr)  # beside the expert, not behind it: an unused tile's pairs are there too, if not set
    if (expert >= 0) & (first < num_pairs):
        WIDTH: tl.constexpr = BLOCK_N // PARTS
        local = tl.arange(0, BLOCK_N)
        w_rows = (local // WIDTH) * N + column * WIDTH + local % WIDTH
        w_ptrs = w_ptr + expert * w_stride_e + w_rows[None, :] * w_stride_n + tl.arange(0, GROUP)[:, None]
        blocks = tl.arange(0, PARTS) * (N // GROUP) + column * WIDTH // GROUP
        w_scale_ptrs = w_scale_ptr + expert * w_scale_stride_e + blocks * w_scale_stride_n
        second = TWO
        if TWO:
            second = tl.load(pairs_ptr + ROWS) < num_pairs  # what is padded comes last in a tile
        if second:
            acc, acc2 = _sums(
                a_ptr, a_scale_ptr, w_ptrs, w_scale_ptrs, pairs_ptr, num_pairs, K, a_stride, a_scale_stride,
                PAIRS_PER_ROW, ROWS, True, PARTS, BLOCK_N, GROUP, STAGES, UPCAST,
            )  # fmt: skip
            _write(acc, out_ptr, pairs_ptr, column, num_pairs, N, PARTS)
            _write(acc2, out_ptr, pairs_ptr + ROWS, column, num_pairs, N, PARTS)
        else:
            acc, acc2 = _sums(
                a_ptr, a_scale_ptr, w_ptrs, w_scale_ptrs, pairs_ptr, num_pairs, K, a_stride, a_scale_stride,
                PAIRS_PER_ROW, ROWS, False, PARTS, BLOCK_N, GROUP, STAGES, UPCAST,
            )  # fmt: skip
            _write(acc, out_ptr, pairs_ptr, column, num_pairs, N, PARTS)


def _tall_product(
    a: torch.Tensor,
    a_scale: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    tiles: Tiles,
    out: torch.Tensor,
    *,
    pairs_per_row: int,
    swiglu: bool,
    tile: Tile,
) -> None:
    """Fill out [pairs, N] from codes a [pairs / pairs_per_row, K] and weight [E, N or 2N, K], both FP8.

    N and K are multiples of 128; a_scale [rows of a, K / 128], scale [E, rows of weight / 128, K / 128].
    """
    num_pairs, N = out.shape
    scale = scale.contiguous()
    two = not swiglu
    _tall_kernel[(N // tile.block_n, tiles.max_tiles * (1 if two else _HEIGHT // TILES.block_m))](
        a,
        a_scale,
        weight,
        scale,
        out,
        tiles.pairs,
        tiles.experts,
        num_pairs,
        N,
        a.shape[1],
        a.stride(0),
        a_scale.stride(0),
        weight.stride(0),
        weight.stride(1),
        scale.stride(0),
        scale.stride(1),
        PAIRS_PER_ROW=pairs_per_row,
        HEIGHT=tiles.block_m,
        ROWS=TILES.block_m,
        TWO=two,
        PARTS=2 if swiglu else 1,
        BLOCK_N=2 * tile.block_n if swiglu else tile.block_n,
        GROUP=GROUP,
        STAGES=tile.num_stages,
        UPCAST=interpreting() and not a.is_cuda,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def fused_moe_tall(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; the arguments are taken as checked, weights as `tall_rule.runs_tall` wants them."""
    assert w13_scale is not None and w2_scale is not None
    pairs, (num_experts, hidden, inner) = topk_ids.numel(), w2.shape
    tiles, _ = align(topk_ids, num_experts, _HEIGHT)
    activated, values = x.new_empty((pairs, inner)), x.new_empty((pairs, hidden))
    _tall_product(
        *quantize_tokens(x), w13, w13_scale, tiles, activated,
        pairs_per_row=topk_ids.shape[1], swiglu=True, tile=TILES.gate_up,
    )  # fmt: skip
    _tall_product(
        *quantize_tokens(activated), w2, w2_scale, tiles, values, pairs_per_row=1, swiglu=False, tile=TILES.down
    )
    out = x.new_empty(x.shape)
    weighted_sum(values, None, topk_weights, topk_ids, num_experts, out)
    return out
