"""What both engines' layers are made of: weights under the checkpoint's names, our kernels called between them.

The projections, the attention over the cache and the sums over ranks are the engine's; its classes add those.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import nn

from .config import LayerKind, Qwen3NextSpec
from .errors import PluginError
from .expert_shard import ExpertShard
from .kernels.moe import add_shared_expert, fused_moe, route
from .kernels.norm import add_rms_norm, rms_norm, rms_norm_gated
from .kernels.rope import qk_norm_rope
from .weights import Placement, shard_fused

FP8_BLOCK = 128


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
    """A Gated DeltaNet layer without its projections and its recurrent core; the sizes are those of one rank."""

    def __init__(self, spec: Qwen3NextSpec, rank: int, size: int, prefix: str) -> None:
        super().__init__()
        gdn = spec.gdn
        self.spec, self.prefix = spec, prefix
        self.tp_rank, self.tp_size = rank, size
        self.num_k_heads = gdn.num_k_heads // size
        self.num_v_heads = gdn.num_v_heads // size
        self.head_v_dim = gdn.head_v_dim
        self.conv_dim = gdn.conv_dim // size
        self.conv1d = WeightHolder(self.conv_dim, gdn.conv_kernel_size, loader=self._loader("conv1d.weight"))
        self.norm = WeightHolder(gdn.head_v_dim)
        self.A_log = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=self._loader("A_log"))
        self.dt_bias = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=self._loader("dt_bias"))

    def _loader(self, name: str) -> Callable[[nn.Parameter, torch.Tensor], None]:
        return partial(self._load_shard, f"{self.prefix}.{name}")

    def _load_shard(self, name: str, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
        parameter.data.copy_(shard_fused(name, loaded, self.spec, self.tp_rank, self.tp_size))

    def split(self, qkvz: torch.Tensor, ba: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Views of this rank's projections: mixed_qkv [T, conv_dim], z [T, HV, V], b [T, HV], a [T, HV]."""
        z = qkvz[:, self.conv_dim :].unflatten(-1, (self.num_v_heads, self.head_v_dim))
        return qkvz[:, : self.conv_dim], z, ba[:, : self.num_v_heads], ba[:, self.num_v_heads :]

    def gated_norm(self, core: torch.Tensor, z: torch.Tensor) -> torch.Tensor:
        """core and z [T, HV, V] -> [T, HV * V], what the output projection reads."""
        return rms_norm_gated(core, z, self.norm.weight, self.spec.rms_norm_eps).flatten(1)


class GatedAttentionParts(nn.Module):
    """Gated attention without its projections and cache; all layers share `cos_sin` [P, rotary_dim] fp32."""

    def __init__(self, spec: Qwen3NextSpec, size: int, cos_sin: torch.Tensor) -> None:
        super().__init__()
        attention = spec.attention
        self.eps = spec.rms_norm_eps
        self.head_dim = attention.head_dim
        self.num_heads = attention.num_heads // size
        self.num_kv_heads = max(1, attention.num_kv_heads // size)
        self.q_norm = WeightHolder(attention.head_dim)
        self.k_norm = WeightHolder(attention.head_dim)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def norm_and_rotate(self, qkv: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """This rank's projection [T, ...] -> q and gate [T, heads * D], k and v [T, kv_heads * D], as q, k, v, gate."""
        return qk_norm_rope(
            qkv,
            self.q_norm.weight,
            self.k_norm.weight,
            self.cos_sin,
            positions,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            eps=self.eps,
        )


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


class MoeParts(nn.Module):
    """Softmax routing over all experts, the top k renormalised, plus a shared expert behind a sigmoid gate.

    ``gate`` is the engine's linear layer (its output comes first in a tuple), ``shared_expert`` its MLP.
    """

    def __init__(
        self, spec: Qwen3NextSpec, *, gate: nn.Module, experts: RoutedExperts, shared_expert: nn.Module
    ) -> None:
        super().__init__()
        self.moe = spec.moe
        self.gate = gate
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_expert_gate = WeightHolder(1, spec.hidden_size)

    def partial_sum(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size], to be summed over the tensor-parallel ranks."""
        logits = self.gate(hidden_states)[0]
        weights, ids = route(logits, self.moe.top_k, self.moe.norm_topk_prob)
        routed = self.experts(hidden_states, weights, ids)
        return add_shared_expert(
            routed, self.shared_expert(hidden_states), hidden_states, self.shared_expert_gate.weight
        )


class DecoderParts(nn.Module):
    """Pre-norm residual layer around one token mixer and one MLP; sub-modules carry the checkpoint's names."""

    def __init__(self, spec: Qwen3NextSpec, kind: LayerKind, mixer: nn.Module, mlp: nn.Module) -> None:
        super().__init__()
        self.kind = kind
        # Engines tell the kinds of layers apart by which of the two names is there.
        if kind is LayerKind.LINEAR:
            self.linear_attn = mixer
        else:
            self.self_attn = mixer
        self.mlp = mlp
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
