"""What one batch of sequences carries from one call of the oracle to the next."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class LayerState:
    """The state of one layer: ``keys``/``values`` of a full layer, ``conv``/``ssm`` of a linear one; None before the
    first token."""

    keys: Tensor | None = None  # [B, T, num_kv_heads, head_dim], after norm and rotary
    values: Tensor | None = None  # [B, T, num_kv_heads, head_dim]
    conv: Tensor | None = None  # [B, W - 1, conv_dim]: the last inputs of the convolution, oldest first
    ssm: Tensor | None = None  # [B, num_v_heads, head_v_dim, head_k_dim], float32 or wider

    def copy(self) -> "LayerState":
        """A state of its own: the oracle replaces tensors and never writes into them, so sharing them is safe."""
        return LayerState(self.keys, self.values, self.conv, self.ssm)


@dataclass
class ReferenceCache:
    """The states of all layers of a batch whose sequences have the same length.

    ``layers`` maps a layer's prefix (``model.layers.3.``, ``mtp.layers.0.``) to its state. ``length`` counts the
    tokens the decoder has seen and ``mtp_length`` those the MTP layer has.
    """

    length: int = 0
    mtp_length: int = 0
    layers: dict[str, LayerState] = field(default_factory=dict)

    def layer(self, prefix: str) -> LayerState:
        """The state of the layer called ``prefix``, made empty at its first use."""
        return self.layers.setdefault(prefix, LayerState())

    def copy(self) -> "ReferenceCache":
        """A snapshot: going on from the copy leaves this cache as it is."""
        return ReferenceCache(
            self.length, self.mtp_length, {prefix: state.copy() for prefix, state in self.layers.items()}
        )
