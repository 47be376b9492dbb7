"""The experts with both products by an engine's function (`..peers`), and around it what prepares and collects rows.

Pairs are sorted in tiles as for our own products. Tokens are rounded to FP8 once each; their codes and factors are
copied to the pairs' rows. How many rows there are follows from shapes alone and no result is read back, so a CUDA graph
can hold it; every value is written once, by one program.
"""

import torch
import triton
import triton.language as tl

from ...dispatch import interpreting
from ...gemm.reference import FP8, FP8_MAX, GROUP
from ...gemm.triton import quantize_tokens, round_to_fp8
from ...integers import next_power_of_2
from ..peers import OFFERS, PeerCall, Plan
from .align import Tiles, align
from .combine import weighted_sum

_COPIED, _ACTIVATED = 8, 16  # rows a program

Quantized = tuple[torch.Tensor, torch.Tensor]
"""Codes and factors."""


@triton.jit
def _ends_kernel(counts_ptr, ends_ptr, num_experts, ALIGNMENT: tl.constexpr, BLOCK_E: tl.constexpr):
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    padded = (counts + ALIGNMENT - 1) // ALIGNMENT * ALIGNMENT
    ends = tl.cumsum(padded, axis=0) - padded + counts
    tl.store(ends_ptr + experts, ends, mask=experts < num_experts)


@triton.jit
def _rows_of(pairs_ptr, experts_ptr, num_pairs, ALIGNMENT: tl.constexpr, ROWS: tl.constexpr):
    """A program's rows, their pairs, and whether there is one: what pads a tile comes last, a quarter of all rows."""
    begin = tl.program_id(0).to(tl.int64) * ROWS
    rows = begin + tl.arange(0, ROWS)
    pairs = tl.load(pairs_ptr + rows)
    expert, first = tl.load(experts_ptr + tl.program_id(0) * ROWS // ALIGNMENT), tl.load(pairs_ptr + begin)
    return rows, pairs, (expert >= 0) & (first < num_pairs)


# What follows from a step's number of tokens is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _copy_rows_kernel(
    words_ptr,
    factors_ptr,
    pairs_ptr,
    experts_ptr,
    row_words_ptr,
    row_factors_ptr,
    places_ptr,
    num_pairs,
    num_rows,
    num_words,
    num_groups,
    TOP_K: tl.constexpr,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_W: tl.constexpr,
    BLOCK_G: tl.constexpr,
):
    """Each pair's row from its token's, four codes a word; factors column by column; places[pair]: the row."""
    rows, pairs, any_used = _rows_of(pairs_ptr, experts_ptr, num_pairs, ALIGNMENT, ROWS)
    if any_used:
        used = pairs < num_pairs
        tl.store(places_ptr + pairs, rows.to(tl.int32), mask=used)
        tokens = (pairs // TOP_K).to(tl.int64)
        groups = tl.arange(0, BLOCK_G)
        inside = used[:, None] & (groups < num_groups)[None, :]
        factors = tl.load(factors_ptr + tokens[:, None] * num_groups + groups[None, :], mask=inside, other=0.0)
        columns = groups.to(tl.int64) * num_rows
        tl.store(row_factors_ptr + columns[None, :] + rows[:, None], factors, mask=inside)
        places = tl.arange(0, BLOCK_W)
        inside = used[:, None] & (places < num_words)[None, :]
        words = tl.load(words_ptr + tokens[:, None] * num_words + places[None, :], mask=inside, other=0)
        tl.store(row_words_ptr + rows[:, None] * num_words + places[None, :], words, mask=inside)


@triton.jit(do_not_specialize=["num_pairs", "num_rows"])
def _activate_rows_kernel(
    values_ptr,
    pairs_ptr,
    experts_ptr,
    codes_ptr,
    factors_ptr,
    num_pairs,
    num_rows,
    inner,
    ALIGNMENT: tl.constexpr,
    ROWS: tl.constexpr,
    GROUP: tl.constexpr,
    FP8_MAX: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    """silu(gate) * up of rows gate | up, float32 inside, rounded to FP8 as `quantize_tokens` does."""
    rows, pairs, any_used = _rows_of(pairs_ptr, experts_ptr, num_pairs, ALIGNMENT, ROWS)
    if any_used:
        used = pairs < num_pairs
        group = tl.program_id(1).to(tl.int64)
        columns = group * GROUP + tl.arange(0, GROUP)
        gates = values_ptr + rows[:, None] * (2 * inner) + columns[None, :]
        gate = tl.load(gates, mask=used[:, None], other=0.0).to(tl.float32)
        up = tl.load(gates + inner, mask=used[:, None], other=0.0).to(tl.float32)
        # silu by a power of two: the fewest instructions, of which there is time for hardly more while rows come and go
        silu = gate / (1.0 + tl.exp2(gate * -1.4426950408889634))
        codes, factors = round_to_fp8(silu * up, FP8_MAX, INTERPRETED)
        places = codes_ptr + rows[:, None] * inner + columns[None, :]
        tl.store(places, codes.to(codes_ptr.dtype.element_ty), mask=used[:, None])
        tl.store(factors_ptr + group * num_rows + rows, factors, mask=used)


def _empty_rows(plan: Plan, columns: int, device: torch.device) -> Quantized:
    """Codes [R, columns], and factors [R, columns / 128] that lie column by column."""
    codes = torch.empty((plan.rows, columns), dtype=FP8, device=device)
    return codes, torch.empty((columns // GROUP, plan.rows), dtype=torch.float32, device=device).T


def _copied(plan: Plan, x: torch.Tensor, tiles: Tiles, top_k: int) -> tuple[Quantized, torch.Tensor]:
    """The pairs' rows, and each pair's place among them; places of skipped pairs are not set."""
    (codes, factors), (tokens, hidden) = quantize_tokens(x), x.shape
    rows = _empty_rows(plan, hidden, x.device)
    places = torch.empty(tokens * top_k, dtype=torch.int32, device=x.device)
    _copy_rows_kernel[(tiles.pairs.numel() // _COPIED,)](
        codes.view(torch.int32),
        factors,
        tiles.pairs,
        tiles.experts,
        rows[0].view(torch.int32),
        rows[1],
        places,
        places.numel(),
        plan.rows,
        hidden // 4,
        hidden // GROUP,
        TOP_K=top_k,
        ALIGNMENT=plan.alignment,
        ROWS=_COPIED,
        BLOCK_W=next_power_of_2(hidden // 4),
        BLOCK_G=next_power_of_2(hidden // GROUP),
        num_warps=4,
    )
    return rows, places


def _activated(plan: Plan, values: torch.Tensor, tiles: Tiles, num_pairs: int) -> Quantized:
    inner = values.shape[1] // 2
    rows = _empty_rows(plan, inner, values.device)
    _activate_rows_kernel[(tiles.pairs.numel() // _ACTIVATED, inner // GROUP)](
        values,
        tiles.pairs,
        tiles.experts,
        *rows,
        num_pairs,
        plan.rows,
        inner,
        ALIGNMENT=plan.alignment,
        ROWS=_ACTIVATED,
        GROUP=GROUP,
        FP8_MAX=FP8_MAX,
        INTERPRETED=interpreting() and not values.is_cuda,
        num_warps=4,
    )
    return rows


def fused_moe_by_peer(
    plan: Plan,
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; the arguments are taken as checked, weights as FP8 blocks of 128x128.

    Sums between the products are rounded to bfloat16, whatever x's dtype is: that is what peers give.
    """
    assert w13_scale is not None and w2_scale is not None
    (tokens, top_k), num_experts = topk_ids.shape, w2.shape[0]
    function = OFFERS.found[plan.peer].function
    tiles, counts = align(topk_ids, num_experts, plan.alignment)
    ends = torch.empty_like(counts)
    block = next_power_of_2(num_experts)
    _ends_kernel[(1,)](counts, ends, num_experts, ALIGNMENT=plan.alignment, BLOCK_E=block, num_warps=4)

    def product(rows: Quantized, weight: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        out = torch.empty((plan.rows, weight.shape[1]), dtype=torch.bfloat16, device=x.device)
        function(PeerCall(*rows, weight.contiguous(), scale.contiguous(), ends, plan.alignment, out))
        return out

    rows, places = _copied(plan, x, tiles, top_k)
    values = product(rows, w13, w13_scale)
    del rows  # its memory is the next product's
    activated = _activated(plan, values, tiles, tokens * top_k)
    del values
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    weighted_sum(product(activated, w2, w2_scale), places, topk_weights, topk_ids, num_experts, out)
    return out
