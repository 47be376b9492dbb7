"""The shape of a Qwen3-Next model as frozen dataclasses; `config.parse_config` makes them from config.json.

All sizes are counts of elements, heads, layers or tokens; nothing here knows about an engine or a device.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # settings import this, and the command line must not wait for torch
    import torch


class LayerKind(StrEnum):
    """The token mixer of a decoder layer; the values are those of ``layer_types`` in config.json."""

    LINEAR = "linear_attention"
    FULL = "full_attention"


@dataclass(frozen=True)
class GdnSpec:
    """A Gated DeltaNet layer (Yang et al. 2024, "Gated Delta Networks")."""

    num_k_heads: int
    num_v_heads: int
    head_k_dim: int
    head_v_dim: int
    conv_kernel_size: int

    @property
    def key_dim(self) -> int:
        """Width of q, and of k."""
        return self.num_k_heads * self.head_k_dim

    @property
    def value_dim(self) -> int:
        """Width of v, and of the output gate z."""
        return self.num_v_heads * self.head_v_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the short convolution: q, k and v side by side."""
        return 2 * self.key_dim + self.value_dim

    @property
    def heads_per_group(self) -> int:
        """Value heads that share one key head."""
        return self.num_v_heads // self.num_k_heads


@dataclass(frozen=True)
class AttentionSpec:
    """A gated full-attention layer: q carries an output gate of its own width, rotary turns ``rotary_dim`` columns."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    rotary_dim: int
    bias: bool = False


@dataclass(frozen=True)
class MoeSpec:
    """A mixture-of-experts block with one always-active shared expert."""

    num_experts: int
    top_k: int
    intermediate_size: int
    shared_intermediate_size: int
    norm_topk_prob: bool = True


@dataclass(frozen=True)
class RopeSpec:
    """Rotary position embedding; every field after ``partial_rotary_factor`` belongs to YaRN and is None for "default".

    ``attention_factor`` is None where the paper's default applies (Peng et al. 2023, "YaRN", eq. 22).
    """

    theta: float
    partial_rotary_factor: float
    rope_type: str = "default"
    factor: float | None = None
    original_max_position_embeddings: int | None = None
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    truncate: bool | None = None


@dataclass(frozen=True)
class IntegerFormat:
    """Integer codes of ``bits`` (4 or 8) with one scale for ``group_size`` columns of a row, None for all of it.

    ``packing`` says how the checkpoint stores them: "awq", "gptq", "gptq_v2", "pack-quantized" or "int-quantized".
    Without ``symmetric`` each scale has a zero point beside it. ``quantize_activations``: activations are rounded to
    INT8 too, with one scale a token.
    """

    packing: str
    bits: int
    group_size: int | None
    symmetric: bool = True
    quantize_activations: bool = False

    def groups(self, columns: int) -> int | None:
        """Scales of a row of so many columns; None where groups do not divide it."""
        group = self.group_size or columns
        return None if columns % group else columns // group

    def __str__(self) -> str:
        return (
            f"{self.packing} int{self.bits}, {f'groups of {self.group_size}' if self.group_size else 'a scale a row'}"
        )


@dataclass(frozen=True)
class ModuleRule:
    """Modules of these names, with one of these parts in theirs, or matched from their start on by one of these regular
    expressions, are stored so; ``format`` None: they are not quantised.
    """

    format: IntegerFormat | None
    names: frozenset[str] = frozenset()
    parts: tuple[str, ...] = ()
    patterns: tuple[str, ...] = ()

    def covers(self, module: str) -> bool:
        """Whether this rule is about the checkpoint's module of that dotted name."""
        if module in self.names or any(part in module for part in self.parts):
            return True
        return any(re.match(pattern, module) for pattern in self.patterns)


@dataclass(frozen=True)
class QuantSpec:
    """How the checkpoint's linear layers are quantised.

    FP8: ``weight_block_size`` is (rows, columns) covered by one scale, None for one scale a tensor or channel;
    ``ignored`` names the modules that stay in ``Qwen3NextSpec.dtype``. Integers: the first of ``rules`` that covers a
    module says how it is stored. One of the two.
    """

    method: str
    weight_block_size: tuple[int, int] | None = None
    ignored: tuple[str, ...] = ()
    activation_scheme: str | None = None
    rules: tuple[ModuleRule, ...] = ()

    def is_ignored(self, module: str) -> bool:
        """Whether the checkpoint module of this dotted name (no ``.weight``) is left unquantised.

        An entry of ``ignored`` matches the module itself, everything below it, and, given without what stands before
        it, such as ``mlp.gate`` or ``linear_attn``, that module of every layer. Parts of names do not match.
        """
        if self.rules:
            return self.integer_format(module) is None
        return any(f".{entry.strip('.')}." in f".{module}." for entry in self.ignored)

    def integer_format(self, module: str) -> IntegerFormat | None:
        """How the linear layer of this name in the checkpoint is stored, None for one that is not made of integers."""
        return next((rule.format for rule in self.rules if rule.covers(module)), None)


@dataclass(frozen=True)
class Qwen3NextSpec:
    """A whole model; ``dense_layers`` are the layers with a plain MLP (width ``intermediate_size``) instead of experts.

    ``num_mtp_layers`` is what config.json says; published checkpoints carry an MTP layer without saying so, which
    `weights.has_mtp` finds out.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layer_kinds: tuple[LayerKind, ...]
    dense_layers: frozenset[int]
    gdn: GdnSpec
    attention: AttentionSpec
    moe: MoeSpec
    rope: RopeSpec
    rms_norm_eps: float
    tie_word_embeddings: bool
    max_position_embeddings: int
    num_mtp_layers: int
    dtype: torch.dtype
    quant: QuantSpec | None = None

    @property
    def num_layers(self) -> int:
        """Decoder layers, MTP not counted."""
        return len(self.layer_kinds)
