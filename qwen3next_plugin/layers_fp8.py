"""Linear layers in FP8 blocks whose slice for a rank ends inside a block, which engines' own FP8 layers refuse.

vLLM and SGLang both raise ValueError ("Weight output_partition_size = 64 is not divisible by weight quantization
block_n = 128") for the shared expert at tensor-parallel size 8. Here a slice keeps its codes and gets the factors of
the blocks it lies in, on a finer grid where one grid of 128 cannot say it (`weights_shards.scale_block`).
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import torch
from torch import nn

from .errors import ConfigError
from .kernels.gemm import FP8, block_fp8_matmul
from .layers_base import ParallelLayers, frozen_parameter
from .spec import Qwen3NextSpec
from .weights_layout import FP8_BLOCK, take_block_scales, take_rows
from .weights_shards import scale_block

_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


def fp8_layers(layers: ParallelLayers, spec: Qwen3NextSpec) -> ParallelLayers:
    """``layers``, unquantised for every module that config.json leaves out of FP8, by one rule in both engines.

    Of an entry such as ``mlp.shared_expert`` vLLM takes nothing to be left out and SGLang all of it; the checkpoint's
    tensors are what they are. The same object where nothing is left out.
    """
    if spec.quant is None or not spec.quant.ignored:
        return layers
    left_out, block = partial(left_out_of_fp8, spec=spec), layers.fp8_block
    return replace(layers, left_out=left_out, fp8_block=lambda prefix: None if left_out(prefix) else block(prefix))


def left_out_of_fp8(prefix: str, spec: Qwen3NextSpec) -> bool:
    """Whether config.json leaves all parts of the (fused) module ``prefix`` unquantised. ConfigError: some of them."""
    quant = spec.quant
    if quant is None:
        return False
    above, _, name = prefix.rpartition(".")
    if name == "experts":
        if quant.is_ignored(prefix):
            return True
        named = set(quant.ignored)
        projections = ("gate_proj", "up_proj", "down_proj")
        parts = [f"{prefix}.{i}.{part}" for i in range(spec.moe.num_experts) for part in projections]
        found = {part in named or part.rpartition(".")[0] in named for part in parts}
    else:
        parts = [f"{above}.{part}" for part in _PARTS.get(name, (name,))]
        found = {quant.is_ignored(prefix) or quant.is_ignored(part) for part in parts}
    if len(found) > 1:
        raise ConfigError(
            f"quantization_config leaves parts of {prefix} unquantised and others not: leave out all of {parts[0]} to "
            f"{parts[-1].rpartition('.')[2]}, or none.",
            field="quantization_config",
        )
    return found.pop()


def cuts_fp8_blocks(width: int, prefix: str, layers: ParallelLayers) -> bool:
    """Whether the linear layer ``prefix`` is in FP8 blocks and the slice of its ``width`` is not whole blocks."""
    return layers.size > 1 and bool(width // layers.size % FP8_BLOCK) and layers.fp8_block(prefix) is not None


class _Fp8Slice(nn.Module):
    """weight and weight_scale_inv of one rank: its part of ``width`` along ``dim``, ``parts`` times (gate, then up)."""

    def __init__(self, other: int, width: int, dim: int, parts: int, layers: ParallelLayers, prefix: str) -> None:
        super().__init__()
        self.prefix, self.dim = prefix, dim
        self.count, self.rank = width // layers.size, layers.rank
        self.block = scale_block(FP8_BLOCK, self.count)
        cut, blocks = parts * self.count, parts * -(-self.count // self.block)
        shapes = ((cut, other), (blocks, -(-other // FP8_BLOCK)))
        if dim == -1:
            shapes = ((other, cut), (-(-other // FP8_BLOCK), blocks))
        self.weight = frozen_parameter(*shapes[0], dtype=FP8, loader=self._load)
        self.weight_scale_inv = frozen_parameter(*shapes[1], dtype=torch.float32, loader=self._load)

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, part: int = 0) -> None:
        rows = torch.arange(self.rank * self.count, (self.rank + 1) * self.count, device="cpu")
        if parameter.dtype is FP8:
            mine = take_rows(loaded, rows, self.dim)
        else:
            mine = take_block_scales(loaded, rows, FP8_BLOCK, self.prefix, self.dim, self.block)
        size = mine.shape[self.dim]
        parameter.data.narrow(self.dim, part * size, size).copy_(mine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [T, K] -> ([T, N], None), as engines' layers answer."""
        return block_fp8_matmul(x, self.weight, self.weight_scale_inv), None


class Fp8Columns(_Fp8Slice):
    """Gate and up in one: this rank's rows of each."""

    def __init__(self, input_size: int, width: int, layers: ParallelLayers, prefix: str) -> None:
        super().__init__(input_size, width, -2, 2, layers, prefix)


class Fp8Rows(_Fp8Slice):
    """Down: this rank's columns; the ranks' outputs are summed here if ``reduce_results``."""

    def __init__(self, width: int, output_size: int, layers: ParallelLayers, prefix: str, reduce_results: bool) -> None:
        super().__init__(output_size, width, -1, 1, layers, prefix)
        self.all_reduce = layers.all_reduce if reduce_results else None

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [T, width of this rank] -> ([T, output size], None)."""
        output, _ = super().forward(x)
        return output if self.all_reduce is None else self.all_reduce(output), None
