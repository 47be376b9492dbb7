"""The weighted sum of each token's experts, in the order of its choices: equal inputs give equal bits."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ...early import launch_options
from ...integers import cdiv, next_power_of_2


@triton.jit
def _weighted_sum_kernel(
    values_ptr,
    places_ptr,
    weights_ptr,
    ids_ptr,
    out_ptr,
    H,
    num_experts,
    weights_stride,
    ids_stride,
    TOP_K: tl.constexpr,
    PLACED: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    """out[t] = sum over choices of weight times the pair's value, which is in the pair's row, or (PLACED) its place."""
    if EARLY:
        cuda.gdc_wait()
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    values = ()
    factors = ()
    for choice in tl.static_range(TOP_K):  # all are on their way before one is waited for
        expert = tl.load(ids_ptr + token * ids_stride + choice)
        weight = tl.load(weights_ptr + token * weights_stride + choice).to(tl.float32)
        held = (expert >= 0) & (expert < num_experts)  # rows of skipped pairs were never written
        row = token * TOP_K + choice
        if PLACED:
            row = tl.load(places_ptr + row, mask=held, other=0).to(tl.int64)
        value = tl.load(values_ptr + row * H + cols, mask=cols < tl.where(held, H, 0), other=0.0)
        factor = tl.where(held, weight, 0.0)
        values = values + (value,)  # type: ignore[assignment]
        factors = factors + (factor,)  # type: ignore[assignment]
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    for choice in tl.static_range(TOP_K):
        total += factors[choice] * values[choice].to(tl.float32)
    tl.store(out_ptr + token * H + cols, total.to(out_ptr.dtype.element_ty), mask=cols < H)


def weighted_sum(
    values: torch.Tensor,
    places: torch.Tensor | None,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    out: torch.Tensor,
    few: bool = False,
    early: bool = False,
) -> None:
    """Fill out [T, H] from values [R, H], a row a pair: the pair's own, or the one that places [T * k] int32 says.

    few: in small programs, which an H200 was quicker with up to some hundred tokens, by 1.5 us; early: begin while the
    launch before runs, and wait for its end.
    """
    tokens, hidden = out.shape
    wanted, warps = (256, 2) if few else (1024, 4)
    block = min(wanted, next_power_of_2(hidden))
    _weighted_sum_kernel[(tokens, cdiv(hidden, block))](
        values,
        topk_ids if places is None else places,
        topk_weights,
        topk_ids,
        out,
        hidden,
        num_experts,
        topk_weights.stride(0),
        topk_ids.stride(0),
        TOP_K=topk_ids.shape[1],
        PLACED=places is not None,
        BLOCK_H=block,
        EARLY=early,
        num_warps=warps,
        **launch_options(early),
    )
