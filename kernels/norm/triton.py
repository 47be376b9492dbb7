"""RMS normalisation in Triton: one program a tile of rows, whole rows in registers, float32 inside.

Tensors are seen as [A, B, H] with a stride for A and one for B, so that column slices of a projection are read in
place.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ..early import begins_early, launch_options
from ..integers import cdiv, next_power_of_2

_TILE = 2048  # elements a program holds: small rows are bundled up to it


@triton.jit
def _row_offsets(rows, inner, stride_a, stride_b):
    return (rows // inner).to(tl.int64) * stride_a + (rows % inner).to(tl.int64) * stride_b


# A step's number of rows is not specialised on: a new one compiles nothing.
@triton.jit(do_not_specialize=["num_rows"])
def _rms_norm_kernel(
    x_ptr,
    other_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    num_rows,
    inner,
    H,
    x_stride_a,
    x_stride_b,
    other_stride_a,
    other_stride_b,
    eps,
    ADD: tl.constexpr,
    GATED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_H: tl.constexpr,
    EARLY: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.arange(0, BLOCK_H)
    mask = (rows < num_rows)[:, None] & (cols < H)[None, :]
    weight = tl.load(weight_ptr + cols, mask=cols < H, other=0.0).to(tl.float32)
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    x_offsets = _row_offsets(rows, inner, x_stride_a, x_stride_b)[:, None] + cols[None, :]
    y_offsets = rows.to(tl.int64)[:, None] * H + cols[None, :]
    x = tl.load(x_ptr + x_offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD or GATED:
        other_offsets = _row_offsets(rows, inner, other_stride_a, other_stride_b)[:, None] + cols[None, :]
        other = tl.load(other_ptr + other_offsets, mask=mask, other=0.0).to(tl.float32)
    if ADD:
        total = (x + other).to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + y_offsets, total, mask=mask)
        x = total.to(tl.float32)  # the next layer reads the rounded sum, so that is what is normalised
    scale = tl.rsqrt(tl.sum(x * x, axis=1) / H + eps)
    y = x * scale[:, None]
    if GATED:
        tl.debug_barrier()  # y may be x: an element held by several threads is read by all before one writes
        y = y * weight[None, :] * (other * tl.sigmoid(other))
    else:
        y = y * (1.0 + weight[None, :])
    tl.store(y_ptr + y_offsets, y.to(y_ptr.dtype.element_ty), mask=mask)


def _rows(x: torch.Tensor) -> tuple[torch.Tensor, int, int, int]:
    """x as (tensor, B, stride of A, stride of B) with unit stride inside a row; copies only what has no such form."""
    x = x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()
    if x.dim() == 1:
        return x, 1, 0, 0
    if x.dim() == 2:
        return x, 1, x.stride(0), 0
    x = x if x.dim() == 3 else x.reshape(-1, *x.shape[-2:])
    return x, x.shape[1], x.stride(0), x.stride(1)


def _launch(
    x: torch.Tensor,
    other: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    *,
    add: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The norm of x and, with `add`, the sum that it is of; into `out` and gated by `other` where there is an `out`."""
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device) if out is None else out
    total = torch.empty_like(y) if add else y
    if y.numel() == 0:
        return y, total
    H = x.shape[-1]
    num_rows = y.numel() // H
    x, inner, x_stride_a, x_stride_b = _rows(x)
    other, _, other_stride_a, other_stride_b = (x, inner, 0, 0) if other is None else _rows(other)
    block = next_power_of_2(H)
    rows = max(1, min(_TILE // block, 16, next_power_of_2(num_rows)))
    early = begins_early(y.device, num_rows)
    _rms_norm_kernel[(cdiv(num_rows, rows),)](
        x,
        other,
        weight.contiguous(),
        y,
        total,
        num_rows,
        inner,
        H,
        x_stride_a,
        x_stride_b,
        other_stride_a,
        other_stride_b,
        eps,
        ADD=add,
        GATED=out is not None,
        ROWS=rows,
        BLOCK_H=block,
        EARLY=early,
        num_warps=max(4, min(16, block // 512)),
        **launch_options(early),
    )
    return y, total


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float) -> torch.Tensor:
    """See `kernels.norm.rms_norm`; the arguments are taken as checked."""
    return _launch(x, None, weight, eps)[0]


def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """See `kernels.norm.add_rms_norm`; the arguments are taken as checked."""
    return _launch(x, residual, weight, eps, add=True)


def rms_norm_gated(x: torch.Tensor, z: torch.Tensor, weight: torch.Tensor, eps: float, out: torch.Tensor) -> None:
    """See `kernels.norm.rms_norm_gated`; the arguments are taken as checked."""
    _launch(x, z, weight, eps, out=out)
