"""The layers' MLPs: plain, and the mixture of experts with its shared expert."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import Qwen3NextSpec
from .errors import PluginError
from .expert_shard import ExpertShard
from .kernels.moe import add_shared_expert, fused_moe, route
from .layers_base import ParallelLayers, WeightHolder, ZeroCentredRMSNorm, frozen_parameter
from .layers_few import FewRows
from .layers_fp8 import Fp8Columns, Fp8Rows, cuts_fp8_blocks
from .layers_integer import IntegerExperts
from .weights import Placement
from .weights_layout import FP8_BLOCK


def fp8_block_size(
    quant_config: Any, prefix: str, *, fp8_config: type, is_layer_skipped: Callable[..., bool], engine: str
) -> int | None:
    """128 for a module that the engine's quantisation config makes FP8 with 128x128 scales, None for unquantised ones.

    ``prefix`` names the module of experts, or a linear layer; ``fp8_config`` and ``is_layer_skipped`` are the engine's.
    Raises PluginError for any other format: serving it with the wrong arithmetic would be silent.
    """
    if quant_config is None:
        return None
    method, block = quant_config.get_name(), None
    if isinstance(quant_config, fp8_config):
        fp8: Any = quant_config
        if is_layer_skipped(prefix, fp8.ignored_layers, fp8.packed_modules_mapping):
            return None
        block = fp8.weight_block_size
    if method == "fp8" and block == [FP8_BLOCK, FP8_BLOCK]:
        return FP8_BLOCK
    raise PluginError(
        f"quantization: {prefix} is stored as {method} (weight_block_size {block}), which this plugin "
        "does not run; bf16, fp8 with weight_block_size [128, 128], and AWQ, GPTQ and compressed-tensors without a "
        f"--quantization of their own work, and QWEN3NEXT_PLUGIN=0 serves it with stock {engine}."
    )


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the plain MLP and the shared expert."""

    def __init__(
        self, hidden_size: int, width: int, layers: ParallelLayers, prefix: str, reduce_results: bool = True
    ) -> None:
        super().__init__()
        up, down = f"{prefix}.gate_up_proj", f"{prefix}.down_proj"
        self.gate_up_proj: nn.Module
        self.down_proj: nn.Module
        if cuts_fp8_blocks(width, up, layers):
            self.gate_up_proj = Fp8Columns(hidden_size, width, layers, up)
        else:
            self.gate_up_proj = layers.merged_column(hidden_size, [width] * 2, **layers.options(up))
        if cuts_fp8_blocks(width, down, layers):
            self.down_proj = Fp8Rows(width, hidden_size, layers, down, reduce_results)
        else:
            self.down_proj = layers.row(width, hidden_size, reduce_results=reduce_results, **layers.options(down))
        self.act = layers.silu_and_mul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(hidden_states)[0]))[0]


class Experts(nn.Module):
    """This rank's experts: a slice of every routed one under TP, a range of whole ones under EP; with ``num_shared`` 1
    the shared expert lies behind them as one more.

    ``block`` is 128 for FP8 weights with 128x128 scales, None for weights in the model's dtype.
    """

    def __init__(self, shard: ExpertShard, block: int | None, num_shared: int = 0) -> None:
        super().__init__()
        self.shard, self.num_shared = shard, num_shared
        experts, rows, hidden = shard.num_experts + num_shared, shard.intermediate_size, shard.spec.hidden_size
        dtype = torch.float8_e4m3fn if block else None
        self.w13 = frozen_parameter(experts, 2 * rows, hidden, dtype=dtype, loader=self._load)
        self.w2 = frozen_parameter(experts, hidden, rows, dtype=dtype, loader=self._load)
        self.w13_scale_inv: nn.Parameter | None = None
        self.w2_scale_inv: nn.Parameter | None = None
        if block:
            columns, scale_rows = -(-hidden // block), -(-rows // shard.scale_block(block))
            scale = partial(frozen_parameter, dtype=torch.float32, loader=self._load)
            self.w13_scale_inv = scale(experts, 2 * scale_rows, columns)
            self.w2_scale_inv = scale(experts, columns, scale_rows)

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, placement: Placement) -> None:
        self.shard.place(parameter.data, loaded, placement)

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], weights and ids [T, choices] -> this rank's part of the weighted sum [T, H]."""
        ids = self.shard.local_ids(ids)
        scales = (self.w13_scale_inv, self.w2_scale_inv)
        return fused_moe(hidden_states, self.w13, self.w2, weights, ids, *scales, num_shared=self.num_shared)


class SharedBehindExperts(nn.Module):
    """The shared expert's parameters under the checkpoint's names: views of the last of ``experts``."""

    def __init__(self, experts: Experts) -> None:
        super().__init__()
        self.gate_up_proj = _View(experts.shard, experts.w13, experts.w13_scale_inv, "gate_up_proj")
        self.down_proj = _View(experts.shard, experts.w2, experts.w2_scale_inv, "down_proj")


class _View(nn.Module):
    """The last expert's part of ``weight`` and ``scale``, filled by the rule for this projection of a shared expert."""

    def __init__(self, shard: ExpertShard, weight: nn.Parameter, scale: nn.Parameter | None, projection: str) -> None:
        super().__init__()

        def view(whole: nn.Parameter, name: str) -> nn.Parameter:
            def load(parameter: nn.Parameter, loaded: torch.Tensor, part: int | None = None) -> None:
                placement = Placement(
                    f"mlp.shared_expert.{projection}.{name}", None if part is None else ("gate", "up")[part]
                )
                shard.place_shared(whole.data, loaded, placement)

            parameter = nn.Parameter(whole.data[shard.num_experts], requires_grad=False)
            vars(parameter)["weight_loader"] = load
            return parameter

        self.weight = view(weight, "weight")
        self.weight_scale_inv = None if scale is None else view(scale, "weight_scale_inv")


def joins_experts(spec: Qwen3NextSpec, layers: ParallelLayers, prefix: str) -> bool:
    """Whether the shared expert of the MoE ``prefix`` is stored just as a routed one and cut over ranks alike."""
    moe, shared = spec.moe, (f"{prefix}.shared_expert.gate_up_proj", f"{prefix}.shared_expert.down_proj")
    if moe.shared_intermediate_size != moe.intermediate_size or layers.expert_parallel:
        return False
    if any(layers.integer_format(name) is not None for name in (f"{prefix}.experts.w13", *shared)):
        return False
    return len({layers.fp8_block(name) for name in (f"{prefix}.experts", *shared)}) == 1


class SparseMoE(nn.Module):
    """Softmax routing over all experts, the top k renormalised, plus a shared expert behind a sigmoid gate.

    Where it can, the shared expert is run as one more expert that every token chooses, by its gate.
    """

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, prefix: str) -> None:
        super().__init__()
        self.moe = moe = spec.moe
        unquantised = layers.options(f"{prefix}.gate") | {"quant_config": None}
        self.gate = layers.replicated(spec.hidden_size, moe.num_experts, **unquantised)
        self.router = FewRows(f"{prefix}.gate", self.gate, normed=True, keeps=True)
        shard = ExpertShard(spec, layers.rank, layers.size, layers.expert_parallel)
        stored = layers.integer_format(f"{prefix}.experts.w13")
        self.joined = joins_experts(spec, layers, prefix)
        self.experts: nn.Module
        if stored is not None:
            self.experts = IntegerExperts(shard, stored)
        else:
            self.experts = Experts(shard, layers.fp8_block(f"{prefix}.experts"), num_shared=int(self.joined))
        self.shared_expert: nn.Module
        if isinstance(self.experts, Experts) and self.joined:
            self.shared_expert = SharedBehindExperts(self.experts)
        else:
            self.shared_expert = GatedMLP(
                spec.hidden_size, moe.shared_intermediate_size, layers, f"{prefix}.shared_expert", reduce_results=False
            )
        self.shared_expert_gate = WeightHolder(1, spec.hidden_size)
        self.all_reduce = layers.all_reduce if layers.size > 1 else None

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: ZeroCentredRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, hidden_size] -> the output for their sum's norm, summed over the ranks, and the sum."""
        (logits, hidden_states), residual = self.router.of_norm(hidden_states, residual, norm, self.gate)
        return self.mixture(hidden_states, logits), residual

    def mixture(self, hidden_states: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size], by the router's [T, E] -> [T, hidden_size], summed over the ranks."""
        gate = self.shared_expert_gate.weight
        joined = (hidden_states, gate) if self.joined else (None, None)
        weights, ids = route(logits, self.moe.top_k, self.moe.norm_topk_prob, *joined)
        output = self.experts(hidden_states, weights, ids)
        if not self.joined:
            output = add_shared_expert(output, self.shared_expert(hidden_states), hidden_states, gate)
        return output if self.all_reduce is None else self.all_reduce(output)
