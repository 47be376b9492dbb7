"""The mixture of experts for few tokens, in two launches: nothing is sorted, and nothing is multiplied by matrices.

While hardly two tokens share an expert, each pair (token, choice) reads its expert's rows for vector products. Each
program holds few rows, but whole ones (down: of all of a token's choices): it asks for all of their weights at once,
and no load waits for another one. Where two tokens do share an expert, their programs run side by side and find its
rows in the L2 cache. The second launch, which may begin early (`ways.Way.early`), sums a token's choices in registers,
in their order: no atomics, and equal inputs give equal bits. Weights are widened in registers; their factors are
applied to sums of what lies together in a thread.
"""

import torch
import triton

from ...dispatch import interpreting
from ...early import launch_options
from ...gemm.policy import weight_codes
from ...gemm.reference import GROUP, block_size
from ...integers import cdiv, next_power_of_2
from .few_kernels import down_kernel, gate_up_kernel

_ROWS = 4  # of a weight matrix that a program holds at once, at most
_DOWN_STEPS = 2 if tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 7) else 1
"""Times so many rows in a program of the down product, which reads a token's inputs once for them: two are 1 to 2 %
quicker on an H200, but Triton 3.6 would need 255 registers a thread for them, and spill."""
_MOST_WARPS = 8
_LOAD_BYTES = 16  # that a thread takes at once
_THREAD_BYTES = 256  # of weights that it holds, at most: 64 registers


def parts_of(choices: int) -> tuple[int, int]:
    """Powers of two that hold so many choices, 0 for no second one: of one or two, those that hold the fewest more."""
    whole = next_power_of_2(choices)
    part = whole // 2
    rest = next_power_of_2(choices - part)
    return (whole, 0) if choices == whole or rest >= part else (part, rest)


def _rows(columns: int, element_size: int, block_rows: int) -> tuple[int, int]:
    """Rows of so many columns for a program, within one block of factors, and its warps: as its threads can hold."""
    rows, warps = min(_ROWS, block_rows), _MOST_WARPS // 2
    if rows * columns * element_size > 32 * warps * _THREAD_BYTES:
        warps = _MOST_WARPS
    while rows > 1 and rows * columns * element_size > 32 * warps * _THREAD_BYTES:
        rows //= 2
    return rows, warps


def fused_moe_few(
    x: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    w13_scale: torch.Tensor | None,
    w2_scale: torch.Tensor | None,
    early: bool = False,
) -> torch.Tensor:
    """See `kernels.moe.fused_moe`; activations stay in their dtype, last strides are 1, some pair is there.

    early: the second launch may begin before the first one ends; for a GPU of which `can_begin_early` says so.
    """
    (tokens, hidden), choices, (num_experts, _, inner) = x.shape, topk_ids.shape[1], w2.shape
    gated = torch.empty((tokens * choices, inner), dtype=x.dtype, device=x.device)
    out = torch.empty((tokens, hidden), dtype=x.dtype, device=x.device)
    scaled = w13_scale is not None
    up_offset, rows13, depth13, rows2, depth2 = 0, GROUP, GROUP, GROUP, GROUP
    scale_strides13: tuple[int, ...] = (0, 0)
    scale_strides2: tuple[int, ...] = (0, 0)
    if w13_scale is not None and w2_scale is not None:
        w13_scale, w2_scale = w13_scale.contiguous(), w2_scale.contiguous()
        blocks = w13_scale.shape[1] // 2
        rows13, depth13 = block_size(w13[:, :inner], w13_scale[:, :blocks])
        rows2, depth2 = block_size(w2, w2_scale)
        up_offset = blocks * w13_scale.stride(1)
        scale_strides13, scale_strides2 = w13_scale.stride()[:2], w2_scale.stride()[:2]
        w13, w2 = weight_codes(w13), weight_codes(w2)
    size = w13.element_size()
    load = _LOAD_BYTES // size
    block_k = max(load, next_power_of_2(hidden))
    block_n, num_warps = _rows(2 * block_k, size, rows13)
    gate_up_kernel[(tokens * choices, cdiv(inner, block_n))](
        x,
        w13,
        x if w13_scale is None else w13_scale,
        topk_ids,
        gated,
        num_experts,
        x.stride(0),
        topk_ids.stride(0),
        w13.stride(0),
        *scale_strides13,
        up_offset,
        INNER=inner,
        K=hidden,
        WEIGHT_STRIDE_N=w13.stride(1),
        CHOICES=choices,
        BLOCK_N=block_n,
        BLOCK_K=block_k,
        LOAD=min(load, depth13),
        SCALE_N=rows13,
        SCALE_K=depth13,
        SCALED=scaled,
        EVEN=block_k == hidden and inner % block_n == 0,
        EARLY=early,
        INTERPRETED=interpreting() and not x.is_cuda,
        num_warps=num_warps,
        **launch_options(early),
    )
    (part, rest), block_i = parts_of(choices), max(load, next_power_of_2(inner))
    block_n, num_warps = _rows((part + rest) * block_i, size, rows2)
    down_kernel[(tokens, cdiv(hidden, _DOWN_STEPS * block_n))](
        gated,
        w2,
        x if w2_scale is None else w2_scale,
        topk_ids,
        topk_weights,
        out,
        num_experts,
        topk_ids.stride(0),
        topk_weights.stride(0),
        w2.stride(0),
        *scale_strides2,
        H=hidden,
        INNER=inner,
        WEIGHT_STRIDE_N=w2.stride(1),
        CHOICES=choices,
        PART=part,
        REST=rest,
        STEPS=_DOWN_STEPS,
        BLOCK_N=block_n,
        BLOCK_I=block_i,
        LOAD=min(load, depth2),
        SCALE_N=rows2,
        SCALE_K=depth2,
        SCALED=scaled,
        EVEN=block_i == inner and hidden % (_DOWN_STEPS * block_n) == 0,
        EARLY=early,
        num_warps=num_warps,
        **launch_options(early),
    )
    return out
