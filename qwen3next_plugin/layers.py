"""Qwen3-Next's layers as both engines run them: weights under the checkpoint's names, our kernels called between them.

The engine lends its layers that are cut over ranks (`ParallelLayers`); its adapter adds attention over its cache and
the recurrent core over its states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from .config import LayerKind, Qwen3NextSpec
from .errors import PluginError
from .expert_shard import ExpertShard
from .kernels.moe import add_shared_expert, fused_moe, route
from .kernels.norm import add_rms_norm, rms_norm, rms_norm_gated
from .kernels.rope import qk_norm_rope, sigmoid_gate
from .weights import Placement, shard_fused

FP8_BLOCK = 128


@dataclass(frozen=True)
class ParallelLayers:
    """An engine's linear layers, which load their own slices, and this process's place among the tensor-parallel ranks.

    The layers' forward returns a tuple with the output first. ``expert_block`` says of a module of experts whether its
    weights are FP8 in blocks (128) or not quantised (None); ``all_reduce`` sums over the ranks.
    """

    rank: int
    size: int
    expert_parallel: bool
    quant_config: Any
    expert_block: Callable[[str], int | None]
    merged_column: Callable[..., nn.Module]
    qkv: Callable[..., nn.Module]
    row: Callable[..., nn.Module]
    replicated: Callable[..., nn.Module]
    silu_and_mul: Callable[[], nn.Module]
    all_reduce: Callable[[torch.Tensor], torch.Tensor]

    def options(self, prefix: str) -> dict[str, Any]:
        """What every quantisable layer is built with; ``prefix`` is its name in the checkpoint."""
        return {"bias": False, "quant_config": self.quant_config, "prefix": prefix}


def fp8_expert_block(method: str, block: Sequence[int] | None, prefix: str, engine: str) -> int:
    """128 for experts in FP8 with 128x128 scales.

    Raises PluginError for any other format: serving it with the wrong arithmetic would be silent.
    """
    if method == "fp8" and block is not None and list(block) == [FP8_BLOCK, FP8_BLOCK]:
        return FP8_BLOCK
    raise PluginError(
        f"quantization: the experts of {prefix} are stored as {method} (weight_block_size {block}), which this plugin "
        "does not run; bf16 and fp8 with weight_block_size [128, 128] work, and QWEN3NEXT_PLUGIN=0 serves it with "
        f"stock {engine}."
    )


def frozen_parameter(
    *shape: int, dtype: torch.dtype | None = None, loader: Callable[..., None] | None = None
) -> nn.Parameter:
    """An uninitialised parameter that is not trained, with the `weight_loader` attribute that engines look for."""
    parameter = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
    if loader is not None:
        vars(parameter)["weight_loader"] = loader
    return parameter


class WeightHolder(nn.Module):
    """A module that is only a place for `weight`, so that the parameter has the checkpoint's name."""

    def __init__(self, *shape: int, loader: Callable[..., None] | None = None) -> None:
        super().__init__()
        self.weight = frozen_parameter(*shape, loader=loader)


class ZeroCentredRMSNorm(WeightHolder):
    """x / RMS(x) * (1 + weight), with the residual added first when there is one."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__(size)
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return rms_norm(x, self.weight, self.eps)

    def add(self, x: torch.Tensor, residual: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual); without a residual x starts it."""
        if residual is None:
            return self(x), x
        return add_rms_norm(x, residual, self.weight, self.eps)


class GdnParts(nn.Module):
    """A Gated DeltaNet layer without its recurrent core; sizes are those of one rank.

    The checkpoint's interleaved projections are re-laid flat (q | k | v | z and b | a) at load.
    """

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, prefix: str) -> None:
        super().__init__()
        gdn, rank, size = spec.gdn, layers.rank, layers.size
        self.prefix = prefix
        self.eps = spec.rms_norm_eps
        self.num_k_heads, self.num_v_heads = gdn.num_k_heads // size, gdn.num_v_heads // size
        self.head_v_dim = gdn.head_v_dim
        self.conv_dim = gdn.conv_dim // size
        self.in_proj_qkvz = layers.merged_column(
            spec.hidden_size,
            [gdn.key_dim, gdn.key_dim, gdn.value_dim, gdn.value_dim],
            **layers.options(f"{prefix}.in_proj_qkvz"),
        )
        self.in_proj_ba = layers.merged_column(
            spec.hidden_size, [gdn.num_v_heads, gdn.num_v_heads], **layers.options(f"{prefix}.in_proj_ba")
        )
        self.out_proj = layers.row(gdn.value_dim, spec.hidden_size, **layers.options(f"{prefix}.out_proj"))

        def load(name: str, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            parameter.data.copy_(shard_fused(f"{prefix}.{name}", loaded, spec, rank, size))

        self.conv1d = WeightHolder(self.conv_dim, gdn.conv_kernel_size, loader=partial(load, "conv1d.weight"))
        self.norm = WeightHolder(gdn.head_v_dim)
        self.A_log = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=partial(load, "A_log"))
        self.dt_bias = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=partial(load, "dt_bias"))

    def project(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's qkvz [T, conv_dim + HV * V] and ba [T, 2 * HV]."""
        return self.in_proj_qkvz(hidden_states)[0], self.in_proj_ba(hidden_states)[0]

    def core_inputs(self, qkvz: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Views of the projections: mixed_qkv [T, conv_dim], a and b [T, HV]."""
        return qkvz[:, : self.conv_dim], ba[:, self.num_v_heads :], ba[:, : self.num_v_heads]

    def finish(self, core: torch.Tensor, qkvz: torch.Tensor) -> torch.Tensor:
        """core [T, HV, V] normed, gated by z and projected -> [T, hidden_size], summed over the ranks."""
        z = qkvz[:, self.conv_dim :].unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return self.out_proj(rms_norm_gated(core, z, self.norm.weight, self.eps).flatten(1))[0]


class GatedAttentionParts(nn.Module):
    """Attention whose query projection carries an output gate, without the attention over a cache.

    All layers share `cos_sin` [P, rotary_dim] fp32; sizes are those of one rank.
    """

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, cos_sin: torch.Tensor, prefix: str) -> None:
        super().__init__()
        attention = spec.attention
        self.eps = spec.rms_norm_eps
        self.head_dim = attention.head_dim
        self.num_heads = attention.num_heads // layers.size
        self.num_kv_heads = max(1, attention.num_kv_heads // layers.size)
        self.qkv_proj = layers.qkv(
            spec.hidden_size,
            attention.head_dim,
            2 * attention.num_heads,  # per head: query, then gate
            attention.num_kv_heads,
            **layers.options(f"{prefix}.qkv_proj"),
        )
        self.o_proj = layers.row(
            attention.num_heads * attention.head_dim, spec.hidden_size, **layers.options(f"{prefix}.o_proj")
        )
        self.q_norm = WeightHolder(attention.head_dim)
        self.k_norm = WeightHolder(attention.head_dim)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def project(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q and gate [T, heads * D], k and v [T, kv_heads * D], in the order q, k, v, gate."""
        return qk_norm_rope(
            self.qkv_proj(hidden_states)[0],
            self.q_norm.weight,
            self.k_norm.weight,
            self.cos_sin,
            positions,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=self.eps,
        )

    def finish(self, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Both [T, heads * D] -> [T, hidden_size], summed over the ranks."""
        return self.o_proj(sigmoid_gate(attended, gate))[0]


class GatedMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the plain MLP and the shared expert."""

    def __init__(
        self, hidden_size: int, width: int, layers: ParallelLayers, prefix: str, reduce_results: bool = True
    ) -> None:
        super().__init__()
        self.gate_up_proj = layers.merged_column(hidden_size, [width] * 2, **layers.options(f"{prefix}.gate_up_proj"))
        self.down_proj = layers.row(
            width, hidden_size, reduce_results=reduce_results, **layers.options(f"{prefix}.down_proj")
        )
        self.act = layers.silu_and_mul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.down_proj(self.act(self.gate_up_proj(hidden_states)[0]))[0]


class RoutedExperts(nn.Module):
    """This rank's routed experts: a slice of every expert under TP, a range of whole experts under EP.

    ``block`` is 128 for FP8 weights with 128x128 scales, None for weights in the model's dtype.
    """

    def __init__(self, shard: ExpertShard, block: int | None) -> None:
        super().__init__()
        self.shard = shard
        experts, rows, hidden = shard.num_experts, shard.intermediate_size, shard.spec.hidden_size
        dtype = torch.float8_e4m3fn if block else None
        self.w13 = frozen_parameter(experts, 2 * rows, hidden, dtype=dtype, loader=self._load)
        self.w2 = frozen_parameter(experts, hidden, rows, dtype=dtype, loader=self._load)
        self.w13_scale_inv: nn.Parameter | None = None
        self.w2_scale_inv: nn.Parameter | None = None
        if block:
            columns, scale_rows = -(-hidden // block), -(-rows // block)
            scale = partial(frozen_parameter, dtype=torch.float32, loader=self._load)
            self.w13_scale_inv = scale(experts, 2 * scale_rows, columns)
            self.w2_scale_inv = scale(experts, columns, scale_rows)

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, placement: Placement) -> None:
        self.shard.place(parameter.data, loaded, placement)

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], weights and ids [T, top_k] -> this rank's part of the weighted sum [T, H]."""
        ids = self.shard.local_ids(ids)
        return fused_moe(hidden_states, self.w13, self.w2, weights, ids, self.w13_scale_inv, self.w2_scale_inv)


class SparseMoE(nn.Module):
    """Softmax routing over all experts, the top k renormalised, plus a shared expert behind a sigmoid gate."""

    def __init__(self, spec: Qwen3NextSpec, layers: ParallelLayers, prefix: str) -> None:
        super().__init__()
        self.moe = moe = spec.moe
        unquantised = layers.options(f"{prefix}.gate") | {"quant_config": None}
        self.gate = layers.replicated(spec.hidden_size, moe.num_experts, **unquantised)
        shard = ExpertShard(spec, layers.rank, layers.size, layers.expert_parallel)
        self.experts = RoutedExperts(shard, layers.expert_block(f"{prefix}.experts"))
        self.shared_expert = GatedMLP(
            spec.hidden_size, moe.shared_intermediate_size, layers, f"{prefix}.shared_expert", reduce_results=False
        )
        self.shared_expert_gate = WeightHolder(1, spec.hidden_size)
        self.all_reduce = layers.all_reduce if layers.size > 1 else None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size], summed over the ranks."""
        weights, ids = route(self.gate(hidden_states)[0], self.moe.top_k, self.moe.norm_topk_prob)
        routed = self.experts(hidden_states, weights, ids)
        shared = self.shared_expert(hidden_states)
        output = add_shared_expert(routed, shared, hidden_states, self.shared_expert_gate.weight)
        return output if self.all_reduce is None else self.all_reduce(output)


class DecoderLayer(nn.Module):
    """Pre-norm residual layer around one token mixer and one MLP; sub-modules carry the checkpoint's names."""

    def __init__(
        self,
        spec: Qwen3NextSpec,
        layers: ParallelLayers,
        kind: LayerKind,
        mixer: nn.Module,
        *,
        dense: bool,
        prefix: str,
    ) -> None:
        super().__init__()
        self.kind = kind
        # Engines tell the kinds of layers apart by which of the two names is there.
        if kind is LayerKind.LINEAR:
            self.linear_attn = mixer
        else:
            self.self_attn = mixer
        self.mlp: nn.Module
        if dense:
            self.mlp = GatedMLP(spec.hidden_size, spec.intermediate_size, layers, f"{prefix}.mlp")
        else:
            self.mlp = SparseMoE(spec, layers, f"{prefix}.mlp")
        self.input_layernorm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)
        self.post_attention_layernorm = ZeroCentredRMSNorm(spec.hidden_size, spec.rms_norm_eps)

    def forward(
        self, positions: torch.Tensor, hidden_states: torch.Tensor, residual: torch.Tensor | None, *step: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """hidden_states and residual [T, hidden_size] -> the MLP's output and the residual it is to be added to.

        ``step`` is what the engine's mixers take besides, such as SGLang's ForwardBatch.
        """
        hidden_states, residual = self.input_layernorm.add(hidden_states, residual)
        if self.kind is LayerKind.LINEAR:
            hidden_states = self.linear_attn(hidden_states, *step)
        else:
            hidden_states = self.self_attn(positions, hidden_states, *step)
        hidden_states, residual = self.post_attention_layernorm.add(hidden_states, residual)
        return self.mlp(hidden_states), residual
