"""Products of a few rows with one weight matrix or two, in one launch that waits for the weights' bytes only.

Up to `VECTOR_ROWS` rows are vector products on the plain cores: a program holds all of x and a few of the weight's
rows, most often whole, and issues their loads before it uses one. More rows are matrix products of 8 or 16 rows, in
which the warps of a program share the columns among them and are summed at its end. Nothing is summed across programs:
no atomics, and equal inputs give equal bits. Activations are never rounded to FP8.
"""

from dataclasses import dataclass

import torch

from ..dispatch import interpreting
from ..integers import cdiv, next_power_of_2
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


def tile_of(rows_of_x: int, weight: torch.Tensor, first: Tile | None = None) -> Tile:
    """The tile for a product of so many rows with ``weight`` [N, K], in one launch with the ``first`` weight's if there
    is one. What to tune on a GPU stands here.
    """
    (n, k), size = weight.shape, weight.element_size()
    if first.vector if first is not None else takes_vectors(rows_of_x, weight):
        rows = 4
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
        }
        return {name + suffix: value for name, value in values.items()}


def _cut(weight: torch.Tensor, scale: torch.Tensor | None, tile: Tile) -> _Cut:
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
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
    (M, K), pair = x.shape, second is not None
    own, others = tiles or (tile_of(M, weight), None)
    one = _cut(weight, scale_inv, own)
    other = one if second is None else _cut(*second, others or tile_of(M, second[0], own))
    outs = [torch.empty((M, cut.weight.shape[0]), dtype=x.dtype, device=x.device) for cut in (one, other)[: 1 + pair]]
    if sum(out.numel() for out in outs) == 0:
        return tuple(outs)
    if gate is not None and not one.tile.vector:  # each program would compute all of the gate: a launch costs less
        x, gate = sigmoid_gate(x, gate), None
    x = x if x.stride(1) == 1 else x.contiguous()
    if gate is not None and gate.stride(1) != 1:
        gate = gate.contiguous()
    rows = min(M, VECTOR_ROWS) if one.tile.vector else next(rows for rows in _TILE_ROWS if rows >= M)
    few_matmul_kernel[(one.programs + (other.programs if pair else 0), cdiv(M, rows))](
        x,
        x if gate is None else gate,
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
        0 if gate is None else gate.stride(0),
        one.weight.stride(0),
        other.weight.stride(0),
        *one.scale_strides,
        *other.scale_strides,
        ROWS_OF_X=rows,
        VECTOR=one.tile.vector,
        GATED=gate is not None,
        PAIR=pair,
        UPCAST=interpreting() and not x.is_cuda,
        **one.constants(""),
        **other.constants("2"),
        num_warps=max(one.tile.num_warps, other.tile.num_warps),
        num_stages=one.tile.num_stages,
    )
    return tuple(outs)
