"""RMS normalisation: zero-centred (with and without residual), custom ops safe inside compiled graphs; and gated."""

import torch

from .. import dispatch
from . import reference

for _op in ("rms_norm", "add_rms_norm", "rms_norm_gated"):
    dispatch.declare(_op)


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, other: torch.Tensor | None = None) -> None:
    if x.dim() < 1 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"{op}: weight is {list(weight.shape)} and x is {list(x.shape)}; weight must be [{x.shape[-1]}]"
            if x.dim()
            else f"{op}: x is a scalar; it must be [..., H]"
        )
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        raise ValueError(
            f"{op}: the two inputs must agree, but are {list(x.shape)} {x.dtype} and {list(other.shape)} {other.dtype}"
        )


def _rms_norm_fake(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None) -> torch.Tensor:
    return x.new_empty(x.shape)


@dispatch.custom_op(fake=_rms_norm_fake)
def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None) -> torch.Tensor:
    """y = x / RMS(x) * (1 + weight) over the last dimension, float32 inside.

    x [..., H] bf16/fp16/fp32, any strides; weight [H] zero-centred as in the checkpoint. Returns a contiguous tensor of
    x's shape and dtype. Raises ValueError for shapes that do not fit. Zhang and Sennrich 2019, section 4.
    """
    _check("rms_norm", x, weight)
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return reference.rms_norm(x, weight, eps).contiguous()
    from . import triton

    return triton.rms_norm(x, weight, eps)


def _add_rms_norm_fake(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


@dispatch.custom_op(fake=_add_rms_norm_fake)
def add_rms_norm(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(rms_norm(s, weight, eps), s) with s = x + residual, rounded to x's dtype before it is normalised.

    x and residual [..., H] of one dtype, any strides; weight [H] zero-centred. Returns two new contiguous tensors.
    Raises ValueError for shapes or dtypes that do not fit.
    """
    _check("add_rms_norm", x, weight, residual)
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        y, total = reference.add_rms_norm(x, residual, weight, eps)
        return y.contiguous(), total.contiguous()
    from . import triton

    return triton.add_rms_norm(x, residual, weight, eps)


def norm_of_sum(
    x: torch.Tensor, residual: torch.Tensor | None, weight: torch.Tensor, eps: float, *, backend: str | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm`; without a residual the `rms_norm` of x, and x itself as the sum."""
    if residual is None:
        return rms_norm(x, weight, eps, backend=backend), x
    return add_rms_norm(x, residual, weight, eps, backend=backend)


def rms_norm_gated(
    x: torch.Tensor,
    z: torch.Tensor,
    weight: torch.Tensor,
    eps: float,
    *,
    out: torch.Tensor,
    backend: str | None = None,
) -> None:
    """out = weight * x / RMS(x) * silu(z) over the last dimension, float32 inside; the weight is plain.

    x and z [..., V] of one dtype, any strides (z may be a column slice of a projection); weight [V]; out contiguous, of
    x's shape and dtype, and possibly x itself. No custom op: engines call it from within one of theirs. Raises
    ValueError for shapes or dtypes that do not fit.
    """
    _check("rms_norm_gated", x, weight, z)
    if out.shape != x.shape or out.dtype != x.dtype or not out.is_contiguous():
        raise ValueError(
            f"rms_norm_gated: out is {list(out.shape)} {out.dtype} with strides {out.stride()}; it must be contiguous "
            f"{list(x.shape)} {x.dtype}"
        )
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        out.copy_(reference.rms_norm_gated(x, z, weight, eps))
        return
    from . import triton

    triton.rms_norm_gated(x, z, weight, eps, out)
