"""Qwen3-Next's layers as both engines run them: weights under the checkpoint's names, our kernels called between them.

The engine lends its layers that are cut over ranks (`ParallelLayers`); its adapter adds attention over its cache and
the recurrent core over its states.
"""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn

from .config import LayerKind, Qwen3NextSpec
from .kernels.gdn.step import GdnParameters
from .kernels.rope import qk_norm_rope, qk_norm_rope_write, sigmoid_gate
from .layers_base import ParallelLayers, WeightHolder, ZeroCentredRMSNorm, frozen_parameter
from .layers_few import FewRows, take_few_rows
from .layers_moe import GatedMLP, SparseMoE
from .weights import shard_fused


class GdnParts(nn.Module):
    """A Gated DeltaNet layer without its recurrent core (`kernels.gdn.step`); sizes are those of one rank.

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
        self.in_proj = FewRows(f"{prefix}.in_proj", self.in_proj_qkvz, self.in_proj_ba, normed=True)
        self.out_proj = layers.row(gdn.value_dim, spec.hidden_size, **layers.options(f"{prefix}.out_proj"))
        take_few_rows(f"{prefix}.out_proj", self.out_proj)

        def load(name: str, parameter: nn.Parameter, loaded: torch.Tensor) -> None:
            parameter.data.copy_(shard_fused(f"{prefix}.{name}", loaded, spec, rank, size))

        self.conv1d = WeightHolder(self.conv_dim, gdn.conv_kernel_size, loader=partial(load, "conv1d.weight"))
        self.norm = WeightHolder(gdn.head_v_dim)
        self.A_log = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=partial(load, "A_log"))
        self.dt_bias = frozen_parameter(self.num_v_heads, dtype=torch.float32, loader=partial(load, "dt_bias"))

    def project(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: ZeroCentredRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Of the sum's norm this rank's qkvz [T, conv_dim + HV * V] and ba [T, 2 * HV]; the sum [T, hidden_size]."""
        layers = (self.in_proj_qkvz, self.in_proj_ba)
        (qkvz, ba), residual = self.in_proj.of_norm(hidden_states, residual, norm, *layers)
        return qkvz, ba, residual

    def gates(self, ba: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of that projection: a and b, each [T, HV]."""
        return ba[:, self.num_v_heads :], ba[:, : self.num_v_heads]

    def core_parameters(self) -> GdnParameters:
        """What the recurrent core takes besides the projections: the parameters as they are now."""
        return GdnParameters(
            conv_weight=self.conv1d.weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            norm_weight=self.norm.weight,
            norm_eps=self.eps,
            num_k_heads=self.num_k_heads,
        )

    def finish(self, core: torch.Tensor) -> torch.Tensor:
        """The recurrent core's output, [T, HV, V], projected -> [T, hidden_size], summed over the ranks."""
        return self.out_proj(core.flatten(1))[0]


class Places(NamedTuple):
    """Keys and values [pages, page size, kv heads, D] of a layer's cache, and the tokens' slots [T]; those below the
    first are padding (`kernels.rope.qk_norm_rope_write`).
    """

    keys: torch.Tensor
    values: torch.Tensor
    slots: torch.Tensor
    first_slot: int = 0


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
        self.sizes: dict[str, Any] = {
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
        }
        self.qkv_proj = layers.qkv(
            spec.hidden_size,
            attention.head_dim,
            2 * attention.num_heads,  # per head: query, then gate
            attention.num_kv_heads,
            **layers.options(f"{prefix}.qkv_proj"),
        )
        self.in_proj = FewRows(f"{prefix}.qkv_proj", self.qkv_proj, normed=True)
        self.o_proj = layers.row(
            attention.num_heads * attention.head_dim, spec.hidden_size, **layers.options(f"{prefix}.o_proj")
        )
        self.gated: FewRows | None = None
        if layers.size == 1:  # else the sum over ranks comes after the product, and is the engine's
            self.gated = FewRows(f"{prefix}.o_proj", self.o_proj, gated=True)
        else:
            take_few_rows(f"{prefix}.o_proj", self.o_proj)
        self.q_norm = WeightHolder(attention.head_dim)
        self.k_norm = WeightHolder(attention.head_dim)
        self.cos_sin: torch.Tensor
        self.register_buffer("cos_sin", cos_sin, persistent=False)

    def project(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: ZeroCentredRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """This rank's queries, gates, keys and values of the sum's norm, and the sum [T, hidden_size]."""
        (qkv,), residual = self.in_proj.of_norm(hidden_states, residual, norm, self.qkv_proj)
        return qkv, residual

    def split(
        self, positions: torch.Tensor, qkv: torch.Tensor, places: Places | None = None
    ) -> tuple[torch.Tensor, ...]:
        """Of `project`'s output q and gate [T, heads * D], k and v [T, kv_heads * D], in the order q, k, v, gate.

        places: where k and v are to be written besides.
        """
        if places is None:
            return qk_norm_rope(qkv, *self.constants(), positions, **self.sizes, eps=self.eps)
        gate = qkv.new_empty(qkv.shape[0], self.num_heads * self.head_dim)
        cache = (gate, places.keys, places.values, places.slots)
        options = {**self.sizes, "eps": self.eps, "first_slot": places.first_slot}
        return *qk_norm_rope_write(qkv, *self.constants(), positions, *cache, **options), gate

    def constants(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """q's and k's norm weights [D], and cos | sin [P, rotary_dim]."""
        return self.q_norm.weight, self.k_norm.weight, self.cos_sin

    def finish(self, attended: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Both [T, heads * D] -> [T, hidden_size], summed over the ranks."""
        if self.gated is not None and self.gated.runs(attended, self.o_proj):
            return self.gated(attended, gate)[0]
        return self.o_proj(sigmoid_gate(attended, gate))[0]


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
        self.kind, self.dense = kind, dense
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
        # The norms are part of what follows them: with one row they take no launch of their own.
        before = (hidden_states, residual, self.input_layernorm)
        if self.kind is LayerKind.LINEAR:
            hidden_states, residual = self.linear_attn(*before, *step)
        else:
            hidden_states, residual = self.self_attn(positions, *before, *step)
        if self.dense:
            hidden_states, residual = self.post_attention_layernorm.add(hidden_states, residual)
            return self.mlp(hidden_states), residual
        return self.mlp(hidden_states, residual, self.post_attention_layernorm)
