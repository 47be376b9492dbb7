"""Products of a few rows with weights as they are stored: bf16 or FP8 in blocks, x never rounded."""

import torch

from .. import dispatch
from ..checks import FLOATS
from ..norm import norm_of_sum
from .policy import has_fp8_units
from .reference import FP8, block_size, dequantize_block, has_row_factors

MAX_ROWS = 16
UNEVEN_ROWS = 8
WIDE_ROWS = 8192  # of a weight, from which on its tiles have more rows
WIDE_TILE = 32

dispatch.declare("few_matmul", cuda=(dispatch.Choice(f"up to {MAX_ROWS} rows", why="one launch, activations kept"),))


def _blocks_fit(weight: torch.Tensor, scale_inv: torch.Tensor) -> bool:
    if scale_inv.dtype is not torch.float32 or scale_inv.dim() != 2 or has_row_factors(weight, scale_inv):
        return False
    try:
        block_size(weight, scale_inv)
    except ValueError:
        return False
    return True


def fits_few(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> bool:
    """Whether `few_matmul` takes this weight as it is, without a copy, for x with few enough rows.

    So that an engine's layer, which may have re-laid its weight for its own kernels, can be asked first. The number of
    rows is left out: while a graph is compiled it is not known.
    """
    if x.dim() != 2 or x.dtype not in FLOATS or weight.dim() != 2:
        return False
    if weight.shape[1] != x.shape[1] or weight.stride(1) != 1 or weight.device != x.device:
        return False
    if scale_inv is None:
        return weight.dtype is x.dtype
    return weight.dtype is FP8 and scale_inv.device == x.device and _blocks_fit(weight, scale_inv)


def _leaves_idle(weight: torch.Tensor) -> bool:
    """Whether the last round of a wide FP8 weight's tiles, one a multiprocessor at a time, leaves most of them idle."""
    if weight.dtype is not FP8 or weight.shape[0] < WIDE_ROWS or not has_fp8_units(weight.device):
        return False
    rounds = weight.shape[0] / WIDE_TILE / torch.cuda.get_device_properties(weight.device).multi_processor_count
    return 0 < rounds % 1 < 0.5


def runs_few(rows: int, weight: torch.Tensor) -> bool:
    """Whether so many rows are `few_matmul`'s with this weight [N, K], rather than an engine's own product's.

    More than `UNEVEN_ROWS` rows need tiles of `WIDE_TILE` rows of a wide FP8 weight. 9,216 rows are 2.2 rounds of an
    H200's multiprocessors, which took 10.0 us, and the engines 9.3 and 9.8; 12,288 rows, 2.9 rounds, 10.7 and 10.9.
    """
    return rows <= UNEVEN_ROWS or (rows <= MAX_ROWS and not _leaves_idle(weight))


def _check(op: str, x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor | None, name: str) -> None:
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1]:
        raise ValueError(
            f"{op}: x is {list(x.shape)} and {name} is {list(weight.shape)}; they must be [M, K] and [N, K]"
        )
    if x.shape[0] > MAX_ROWS:
        raise ValueError(f"{op}: x has {x.shape[0]} rows; it takes at most {MAX_ROWS}")
    if x.dtype not in FLOATS:
        raise ValueError(f"{op}: x is {x.dtype}; it must be {' or '.join(map(str, FLOATS))}")
    wanted = x.dtype if scale_inv is None else FP8
    if weight.dtype is not wanted:
        given = "without" if scale_inv is None else "with"
        raise ValueError(f"{op}: {name} is {weight.dtype} {given} factors; it must be {wanted}, as x or in FP8 blocks")
    if scale_inv is not None and not _blocks_fit(weight, scale_inv):
        raise ValueError(
            f"{op}: the factors of {name} {list(weight.shape)} are {scale_inv.dtype} {list(scale_inv.shape)}; they "
            "must be torch.float32, one a block of 128 x 128 or of a smaller power of two"
        )


def _check_alike(op: str, x: torch.Tensor, other: torch.Tensor | None, name: str) -> None:
    if other is not None and (other.shape != x.shape or other.dtype != x.dtype):
        raise ValueError(
            f"{op}: {name} is {other.dtype} {list(other.shape)}; it must be as x, {x.dtype} {list(x.shape)}"
        )


def _reference(x: torch.Tensor, weight: torch.Tensor, scale_inv: torch.Tensor | None) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    values = weight.to(compute) if scale_inv is None else dequantize_block(weight, scale_inv, compute)
    return x.to(compute) @ values.mT


def _few_matmul_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    return x.new_empty((x.shape[0], weight.shape[0]))


@dispatch.custom_op(fake=_few_matmul_fake)
def few_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    *,
    backend: str | None = None,
) -> torch.Tensor:
    """(x * sigmoid(gate)) @ (weight * scale_inv expanded over its blocks).T of at most `MAX_ROWS` rows, in one launch
    (two where there is a gate and more than two rows).

    x [M, K] and gate (optional) bf16/fp16/fp32, rows may be strided; weight [N, K] as x, or float8_e4m3fn with
    scale_inv [ceil(N/128), ceil(K/128)] float32 of any strides (smaller blocks: see `block_size`) -> [M, N] in x's
    dtype, accumulated in float32. Raises ValueError for what does not fit.
    """
    _check("few_matmul", x, weight, scale_inv, "weight")
    _check_alike("few_matmul", x, gate, "gate")
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        compute = torch.promote_types(x.dtype, torch.float32)
        values = x.to(compute) if gate is None else x.to(compute) * torch.sigmoid(gate.to(compute))
        return _reference(values, weight, scale_inv).to(x.dtype)
    from . import triton_few

    return triton_few.few_matmul(x, weight, scale_inv, gate)[0]


def _few_matmul_pair_fake(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: torch.Tensor,
    second_scale_inv: torch.Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty((x.shape[0], weight.shape[0])), x.new_empty((x.shape[0], second.shape[0]))


@dispatch.custom_op(fake=_few_matmul_pair_fake)
def few_matmul_pair(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: torch.Tensor,
    second_scale_inv: torch.Tensor | None,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """x's products with two weights, [M, N] and [M, N2], in one launch; each weight is as `few_matmul` takes it.

    Raises ValueError for what does not fit.
    """
    _check("few_matmul_pair", x, weight, scale_inv, "weight")
    _check("few_matmul_pair", x, second, second_scale_inv, "second")
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return _reference(x, weight, scale_inv).to(x.dtype), _reference(x, second, second_scale_inv).to(x.dtype)
    from . import triton_few

    first, other = triton_few.few_matmul(x, weight, scale_inv, second=(second, second_scale_inv))
    return first, other


def _few_matmul_of_norm_fake(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
    second_scale_inv: torch.Tensor | None = None,
    *,
    keep: bool = False,
    backend: str | None = None,
) -> list[torch.Tensor]:
    outs = [x.new_empty((x.shape[0], one.shape[0])) for one in (weight, second) if one is not None]
    return outs + [x.new_empty(x.shape) for wanted in (residual is not None, keep) if wanted]


@dispatch.custom_op(fake=_few_matmul_of_norm_fake)
def few_matmul_of_norm(
    x: torch.Tensor,
    residual: torch.Tensor | None,
    norm_weight: torch.Tensor,
    eps: float,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None = None,
    second: torch.Tensor | None = None,
    second_scale_inv: torch.Tensor | None = None,
    *,
    keep: bool = False,
    backend: str | None = None,
) -> list[torch.Tensor]:
    """The products of norm(x + residual), zero-centred as in `kernels.norm.add_rms_norm`, with one weight or two.

    x and residual (or None: nothing is added) [M, K], norm_weight [K]; weights as `few_matmul` takes them -> [M, N],
    with a second weight [M, N2], with a residual the sum [M, K], and with ``keep`` the norm itself [M, K], in this
    order. One launch for one row of up to 4,096 bytes of a weight, otherwise two. Raises ValueError for what does not
    fit.
    """
    further = None if second is None else (second, second_scale_inv)
    _check("few_matmul_of_norm", x, weight, scale_inv, "weight")
    if further is not None:
        _check("few_matmul_of_norm", x, *further, "second")
    if norm_weight.shape != x.shape[1:]:
        raise ValueError(
            f"few_matmul_of_norm: norm_weight is {list(norm_weight.shape)} and x is {list(x.shape)}; norm_weight must "
            f"be [{x.shape[1]}]"
        )
    _check_alike("few_matmul_of_norm", x, residual, "residual")
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        y, total = norm_of_sum(x, residual, norm_weight, eps, backend=backend)
        outs = [_reference(y, *one).to(x.dtype) for one in ((weight, scale_inv), further) if one is not None]
        return outs + [left for left, wanted in ((total, residual is not None), (y, keep)) if wanted]
    from . import triton_few

    norm = triton_few.Norm(norm_weight, eps, residual, keep)
    return list(triton_few.few_matmul_of_norm(x, norm, weight, scale_inv, further))
