"""Products of a few rows with one weight matrix or two, in one launch that waits for the weights' bytes only.

Up to `VECTOR_ROWS` rows are vector products on the plain cores: a program holds all of x and a few of the weight's
rows, most often whole, and issues their loads before it uses one. More rows are matrix products of 8 or 16 rows, in
which the warps of a program share the columns among them and are summed at its end. Nothing is summed across programs:
no atomics, and equal inputs give equal bits. Activations are never rounded to FP8. One row may come before its norm.
"""

from dataclasses import dataclass

import torch

from ..dispatch import interpreting
from ..early import begins_early, launch_options
from ..integers import cdiv, next_power_of_2
from ..norm import triton as norms
from ..rope.triton import sigmoid_gate
from .few import WIDE_ROWS, WIDE_TILE
from .policy import weight_codes
from .reference import GROUP, block_size
from .triton_few_kernel import few_matmul_kernel

VECTOR_ROWS = 2
_TILE_ROWS = (8, 16)  # of x in a matrix product
_LOAD_BYTES = 16  # that a thread takes at once
_ROW_BYTES = 4096  # of one of the weight's rows in flight
_PROGRAMS = 256  # two for each multiprocessor of a Hopper GPU
NORMED_ROWS = 8
"""Of a weight that a program with a norm before its product holds: each program norms x anew, so they should be few. An
H200 took 41.3 us a layer of one row, 43.5 with 4 of them, 42.5 with 16, and 41.8 with the norms in launches of their
own; with two rows of x 56 however many, and 54.8 with the norms apart."""


@dataclass(frozen=True)
class Norm:
    """What comes before a product: its input is the zero-centred norm of x, and of the ``residual`` added to it."""

    weight: torch.Tensor
    eps: float
    residual: torch.Tensor | None
    keeps: bool  # the norm itself is wanted, too

    def apart(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The norm and the sum that it is of, in a launch of its own."""
        if self.residual is None:
            return norms.rms_norm(x, self.weight, self.eps), x
        return norms.add_rms_norm(x, self.residual, self.weight, self.eps)


@dataclass(frozen=True)
class Tile:
    """How one weight is cut: ``rows`` of it a program, ``columns`` of it a step, as vector or as matrix products."""

    vector: bool
    rows: int
    columns: int
    num_warps: int
    num_stages: int = 1


def takes_vectors(rows_of_x: int, weight: torch.Tensor) -> bool:
    """Whether so many rows with ``weight`` [N, K] are vector products."""
    wide = weight.shape[0] >= WIDE_ROWS and weight.element_size() == 1
    return rows_of_x <= (1 if wide else VECTOR_ROWS)


def tile_of(rows_of_x: int, weight: torch.Tensor, first: Tile | None = None, normed: bool = False) -> Tile:
    """The tile for a product of so many rows with ``weight`` [N, K], in one launch with the ``first`` weight's if there
    is one, behind a norm or not. What to tune on a GPU stands here.
    """
    (n, k), size = weight.shape, weight.element_size()
    if first.vector if first is not None else takes_vectors(rows_of_x, weight):
        rows = NORMED_ROWS if normed else 4
        while rows > 1 and n < rows * _PROGRAMS:
            rows //= 2
        columns = max(min(next_power_of_2(k), _ROW_BYTES // size), 32 * _LOAD_BYTES // size)
        return Tile(True, rows, columns, num_warps=columns * size // (32 * _LOAD_BYTES))
    if first is not None:  # its warps, each with as many columns
        return Tile(False, 16, first.columns, first.num_warps, first.num_stages)
    if n >= WIDE_ROWS:
        if size == 1:
            return Tile(False, 16 if rows_of_x <= _TILE_ROWS[0] else WIDE_TILE, 256, num_warps=2, num_stages=3)
        return Tile(False, WIDE_TILE, 512, num_warps=4, num_stages=3)
    return Tile(False, 16, 512, num_warps=4, num_stages=3)


@dataclass(frozen=True)
class _Cut:
    """One weight as the kernel takes it."""

    weight: torch.Tensor
    scale: torch.Tensor | None
    tile: Tile
    block: tuple[int, int]  # that one factor covers

    @property
    def block_n(self) -> int:
        return min(self.tile.rows, self.block[0])

    @property
    def one_step(self) -> bool:
        return self.weight.shape[1] <= self.tile.columns

    @property
    def programs(self) -> int:
        return cdiv(self.weight.shape[0], self.block_n)

    @property
    def scale_strides(self) -> tuple[int, ...]:
        return (0, 0) if self.scale is None else self.scale.stride()

    def constants(self, suffix: str) -> dict[str, int | bool]:
        """The kernel's compile-time values for this weight."""
        deepest = self.block[1] if self.scale is not None else GROUP
        depth = _LOAD_BYTES // self.weight.element_size() if self.tile.vector else min(GROUP, deepest)
        values = {
            "BLOCK_N": self.block_n,
            "BLOCK_K": self.tile.columns,
            "DEPTH": min(depth, deepest),
            "SCALE_N": self.block[0],
            "SCALE_K": self.block[1],
            "SCALED": self.scale is not None,
            "WHOLE": self.weight.shape[1] % self.tile.columns == 0,
            "ONE_STEP": self.one_step,
        }
        return {name + suffix: value for name, value in values.items()}


def _cut(weight: torch.Tensor, scale: torch.Tensor | None, tile: Tile) -> _Cut:
    weight = _rows_together(weight)
    if scale is None:
        return _Cut(weight, None, tile, (GROUP, GROUP))
    return _Cut(weight_codes(weight), scale, tile, block_size(weight, scale))


def few_matmul(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    gate: torch.Tensor | None = None,
    second: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, ...]:
    """See `kernels.gemm.few_matmul` and `few_matmul_pair`; the arguments are taken as checked.

    ``tiles`` instead of the table's, for measuring: both as vectors or both as matrices, with as many warps.
    """
    cuts = _cuts(x, weight, scale_inv, second, tiles)
    if gate is not None and not cuts[0].tile.vector:  # each program would compute all of the gate: a launch costs less
        x, gate = sigmoid_gate(x, gate), None
    return _launch(x, cuts, gate, None)


def few_matmul_of_norm(
    x: torch.Tensor,
    norm: Norm,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: tuple[torch.Tensor, torch.Tensor | None] | None = None,
    tiles: tuple[Tile, Tile] | None = None,
) -> tuple[torch.Tensor, ...]:
    """See `kernels.gemm.few_matmul_of_norm`; the arguments are taken as checked. ``tiles`` as in `few_matmul`."""
    if x.shape[0] == 1:
        cuts = _cuts(x, weight, scale_inv, second, tiles, normed=True)
        if all(cut.tile.vector and cut.one_step and cut.programs for cut in cuts):
            return _launch(x, cuts, None, norm)
    y, total = norm.apart(x)
    outs = _launch(y, _cuts(x, weight, scale_inv, second, tiles), None, None)
    return *outs, *([] if norm.residual is None else [total]), *([y] if norm.keeps else [])


def _cuts(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale_inv: torch.Tensor | None,
    second: tuple[torch.Tensor, torch.Tensor | None] | None,
    tiles: tuple[Tile, Tile] | None,
    normed: bool = False,
) -> list[_Cut]:
    own, others = tiles or (tile_of(x.shape[0], weight, normed=normed), None)
    cuts = [_cut(weight, scale_inv, own)]
    if second is not None:
        cuts.append(_cut(*second, others or tile_of(x.shape[0], second[0], own, normed)))
    return cuts


def _rows_together(x: torch.Tensor) -> torch.Tensor:
    return x if x.stride(1) == 1 else x.contiguous()


def _launch(
    x: torch.Tensor, cuts: list[_Cut], gate: torch.Tensor | None, norm: Norm | None
) -> tuple[torch.Tensor, ...]:
    """Each weight's product, then the sum that was normed and the norm, as far as they are asked for."""
    (M, K), one, other = x.shape, cuts[0], cuts[-1]
    outs = [torch.empty((M, cut.weight.shape[0]), dtype=x.dtype, device=x.device) for cut in cuts]
    if sum(out.numel() for out in outs) == 0:
        return tuple(outs)
    added, kept = norm is not None and norm.residual is not None, norm is not None and norm.keeps
    left = [torch.empty((M, K), dtype=x.dtype, device=x.device) for wanted in (added, kept) if wanted]
    beside = gate if norm is None else norm.residual
    x, beside = _rows_together(x), None if beside is None else _rows_together(beside)
    rows = min(M, VECTOR_ROWS) if one.tile.vector else next(rows for rows in _TILE_ROWS if rows >= M)
    early = begins_early(x.device, M)
    few_matmul_kernel[(sum(cut.programs for cut in cuts), cdiv(M, rows))](
        x,
        x if beside is None else beside,
        x if norm is None else norm.weight.contiguous(),
        left[0] if left else x,
        left[-1] if left else x,
        one.weight,
        x if one.scale is None else one.scale,
        outs[0],
        other.weight,
        x if other.scale is None else other.scale,
        outs[-1],
        M,
        one.weight.shape[0],
        other.weight.shape[0],
        K,
        x.stride(0),
        0 if beside is None else beside.stride(0),
        one.weight.stride(0),
        other.weight.stride(0),
        *one.scale_strides,
        *other.scale_strides,
        0.0 if norm is None else norm.eps,
        ROWS_OF_X=rows,
        VECTOR=one.tile.vector,
        GATED=gate is not None,
        NORMED=norm is not None,
        ADDED=added,
        KEPT=kept,
        PAIR=len(cuts) > 1,
        UPCAST=interpreting() and not x.is_cuda,
        **one.constants(""),
        **other.constants("2"),
        EARLY=early,
        num_warps=max(cut.tile.num_warps for cut in cuts),
        num_stages=one.tile.num_stages,
        **launch_options(early),
    )
    return *outs, *left
