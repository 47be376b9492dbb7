"""Linear layers and experts in packed integers (AWQ, GPTQ, compressed-tensors), the same in both engines.

The engines' own layers for these formats differ by engine, device and shape, and know nothing of rows that are re-laid
at load. These take what `weights.fused_stream` yields, and their products are this package's. Where a checkpoint holds
a module unquantised that its config quantises, as MTP layers often are, the module becomes an ordinary one.

On GPUs the engines' Marlin kernels may be faster for the dense layers; nobody has measured that yet.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from .config import IntegerFormat, Qwen3NextSpec
from .errors import WeightError
from .expert_shard import ExpertShard
from .kernels.gemm import quantized_matmul
from .kernels.moe import fused_moe
from .layers_base import ParallelLayers, frozen_parameter
from .weights import Placement
from .weights_shards import integer_format, scale_block, shard_fused


def integer_layers(layers: ParallelLayers, spec: Qwen3NextSpec) -> ParallelLayers:
    """``layers`` with those of integer-quantised modules replaced; the engine builds its unquantised ones for the rest.

    The same object where the model has no such modules.
    """
    if spec.quant is None or not spec.quant.rules:
        return layers
    return replace(
        layers,
        quant_config=None,
        fp8_block=lambda prefix: None,
        integer_format=partial(integer_format, spec=spec),
        merged_column=partial(_merged_column, layers, spec),
        qkv=partial(_qkv, layers, spec),
        row=partial(_row, layers, spec),
        replicated=partial(_replicated, layers, spec),
    )


def _stored(spec: Qwen3NextSpec, prefix: str, columns: int) -> IntegerFormat | None:
    """How the layer is stored; None also where groups do not divide its columns, which nobody can quantise then."""
    stored = integer_format(prefix, spec)
    return None if stored is None or stored.groups(columns) is None else stored


def _merged_column(
    layers: ParallelLayers, spec: Qwen3NextSpec, input_size: int, output_sizes: list[int], **options: Any
) -> nn.Module:
    stored = _stored(spec, options["prefix"], input_size)
    if stored is None:
        return layers.merged_column(input_size, output_sizes, **options | {"quant_config": None})
    rows = [size // layers.size for size in output_sizes]
    # Gate and up are two tensors of a checkpoint; the other merged columns are one.
    shards = ("gate", "up") if options["prefix"].endswith("gate_up_proj") else (None,)
    return IntegerLinear(spec, stored, layers, input_size, _places(shards, rows))


def _qkv(
    layers: ParallelLayers, spec: Qwen3NextSpec, hidden: int, head_dim: int, heads: int, kv_heads: int, **options: Any
) -> nn.Module:
    stored = _stored(spec, options["prefix"], hidden)
    if stored is None:
        return layers.qkv(hidden, head_dim, heads, kv_heads, **options | {"quant_config": None})
    keys = head_dim * max(1, kv_heads // layers.size)
    rows = [head_dim * heads // layers.size, keys, keys]
    return IntegerLinear(spec, stored, layers, hidden, _places(("q", "k", "v"), rows))


def _row(
    layers: ParallelLayers,
    spec: Qwen3NextSpec,
    input_size: int,
    output_size: int,
    *,
    reduce_results: bool = True,
    **options: Any,
) -> nn.Module:
    stored = _stored(spec, options["prefix"], input_size)
    if stored is None:
        options |= {"quant_config": None, "reduce_results": reduce_results}
        return layers.row(input_size, output_size, **options)
    columns, places = input_size // layers.size, _places((None,), [output_size])
    group = scale_block(stored.group_size or input_size, columns)
    return IntegerLinear(spec, stored, layers, columns, places, group=group, reduce_results=reduce_results)


def _replicated(
    layers: ParallelLayers, spec: Qwen3NextSpec, input_size: int, output_size: int, **options: Any
) -> nn.Module:
    # Routers come without a quantisation config: they run unquantised, and so they are loaded.
    stored = _stored(spec, options["prefix"], input_size) if not options["prefix"].endswith("mlp.gate") else None
    if stored is None:
        return layers.replicated(input_size, output_size, **options | {"quant_config": None})
    return IntegerLinear(spec, stored, layers, input_size, _places((None,), [output_size]))


def _places(shards: tuple[str | None, ...], rows: list[int]) -> dict[str | None, tuple[int, int]]:
    """First row and number of rows of each shard; with one shard, of all rows together."""
    if len(shards) == 1:
        return {shards[0]: (0, sum(rows))}
    return {shard: (sum(rows[:i]), rows[i]) for i, shard in enumerate(shards)}


def _codes(stored: IntegerFormat, *shape: int, loader: Any) -> nn.Parameter:
    if stored.bits == 8:
        return frozen_parameter(*shape, dtype=torch.int8, loader=loader)
    return frozen_parameter(*shape[:-1], shape[-1] // 2, dtype=torch.uint8, loader=loader)


class _Stored:
    """What parameters of one module have been loaded with so far, so that unlike parts do not become one tensor."""

    def __init__(self, dtype: torch.dtype) -> None:
        self.dtype = dtype  # of unquantised weights
        self.found: dict[nn.Parameter, torch.dtype] = {}

    def prepare(self, parameter: nn.Parameter, loaded: torch.Tensor, name: str, plain_shape: tuple[int, ...]) -> None:
        """Give ``parameter`` memory for the first part's dtype. Raises WeightError for a later one of another dtype."""
        before = self.found.setdefault(parameter, loaded.dtype)
        if before != loaded.dtype:
            raise WeightError(
                f"{name} would be made of {before} and {loaded.dtype} parts: quantise all parts of it or none."
            )
        if parameter.dtype.is_floating_point or not loaded.dtype.is_floating_point:
            shape, dtype = tuple(parameter.shape), loaded.dtype
            if plain_shape == shape:  # an unquantised weight, whose memory is there already
                dtype = parameter.dtype
        else:
            shape, dtype = plain_shape, self.dtype
        if (shape, dtype) != (tuple(parameter.shape), parameter.dtype):
            parameter.data = torch.empty(shape, dtype=dtype, device=parameter.device)


class IntegerLinear(nn.Module):
    """A rank's slice of one linear layer; its forward answers as engines' layers do.

    ``columns`` are this rank's, ``places`` first row and rows of each shard here, ``group`` the columns of one scale
    where a cut makes it other than the checkpoint's.
    """

    def __init__(
        self,
        spec: Qwen3NextSpec,
        stored: IntegerFormat,
        layers: ParallelLayers,
        columns: int,
        places: dict[str | None, tuple[int, int]],
        *,
        group: int | None = None,
        reduce_results: bool = False,
    ) -> None:
        super().__init__()
        self.spec, self.rank, self.size, self.places = spec, layers.rank, layers.size, places
        self.all_reduce = layers.all_reduce if reduce_results and layers.size > 1 else None
        self.quantize_activations = stored.quantize_activations
        rows = sum(count for _, count in places.values())
        groups = columns // (group or stored.group_size or columns)
        self._plain_shape = (rows, columns)
        self._stored = _Stored(torch.get_default_dtype())
        self.weight = _codes(stored, rows, columns, loader=self._load)
        self.weight_scale: nn.Parameter | None = frozen_parameter(rows, groups, loader=self._load)
        self.weight_zero: nn.Parameter | None = None
        if not stored.symmetric:
            self.weight_zero = frozen_parameter(rows, groups, dtype=torch.uint8, loader=self._load)
        for parameter in self.parameters():
            vars(parameter)["takes_placement"] = True

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, placement: Placement) -> None:
        shape = self._plain_shape if parameter is self.weight else ()
        self._stored.prepare(parameter, loaded, placement.name, shape)
        if parameter is self.weight and loaded.dtype.is_floating_point:
            self.weight_scale = self.weight_zero = None
        mine = shard_fused(placement, loaded, self.spec, self.rank, self.size)
        parameter.data.narrow(0, *self.places[placement.shard]).copy_(mine)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        """x [T, columns] -> ([T, rows], None), summed over the ranks where asked."""
        if self.weight_scale is None:
            output = functional.linear(x, self.weight)
        else:
            output = quantized_matmul(
                x, self.weight, self.weight_scale, self.weight_zero, quantize_activations=self.quantize_activations
            )
        return output if self.all_reduce is None else self.all_reduce(output), None


class IntegerExperts(nn.Module):
    """This rank's routed experts in packed integers; see `layers_moe.Experts`."""

    def __init__(self, shard: ExpertShard, stored: IntegerFormat) -> None:
        super().__init__()
        self.shard, self.quantize_activations = shard, stored.quantize_activations
        experts, rows, hidden = shard.num_experts, shard.intermediate_size, shard.spec.hidden_size
        group = shard.scale_block(stored.group_size or shard.spec.moe.intermediate_size)
        up, down = (experts, 2 * rows), (experts, hidden)
        self._stored = _Stored(torch.get_default_dtype())
        self.w13 = _codes(stored, *up, hidden, loader=self._load)
        self.w2 = _codes(stored, *down, rows, loader=self._load)
        self._plain_shapes = {self.w13: (*up, hidden), self.w2: (*down, rows)}
        up_groups, down_groups = (*up, hidden // (stored.group_size or hidden)), (*down, rows // group)
        self.w13_scale: nn.Parameter | None = frozen_parameter(*up_groups, loader=self._load)
        self.w2_scale: nn.Parameter | None = frozen_parameter(*down_groups, loader=self._load)
        self.w13_zero: nn.Parameter | None = None
        self.w2_zero: nn.Parameter | None = None
        if not stored.symmetric:
            self.w13_zero = frozen_parameter(*up_groups, dtype=torch.uint8, loader=self._load)
            self.w2_zero = frozen_parameter(*down_groups, dtype=torch.uint8, loader=self._load)
        for parameter in self.parameters():
            vars(parameter)["takes_placement"] = True

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, placement: Placement) -> None:
        self._stored.prepare(parameter, loaded, placement.name, self._plain_shapes.get(parameter, ()))
        found = {self._stored.found[codes] for codes in (self.w13, self.w2) if codes in self._stored.found}
        if len(found) > 1:
            raise WeightError(
                f"{placement.name} holds {loaded.dtype}, and the other matrices of these experts do not: quantise all "
                "of them alike or none."
            )
        if found and next(iter(found)).is_floating_point:
            self.w13_scale = self.w2_scale = self.w13_zero = self.w2_zero = None
        self.shard.place(parameter.data, loaded, placement)

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], weights and ids [T, top_k] -> this rank's part of the weighted sum [T, H]."""
        ids = self.shard.local_ids(ids)
        if self.w13_scale is None:
            return fused_moe(hidden_states, self.w13, self.w2, weights, ids)
        return fused_moe(
            hidden_states,
            self.w13,
            self.w2,
            weights,
            ids,
            self.w13_scale,
            self.w2_scale,
            w13_zero=self.w13_zero,
            w2_zero=self.w2_zero,
            quantize_activations=self.quantize_activations,
        )
