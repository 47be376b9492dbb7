"""The short convolution before the delta rule, where a prefill does both."""

from dataclasses import dataclass

from torch import Tensor

FUSED_WIDTH = 4
"""The widest that is run together with what stands before an engine's own prefill function."""


@dataclass(frozen=True)
class Convolution:
    """What mixed_qkv has yet to go through, with SiLU behind it: weight ``[conv_dim, W]``, oldest tap first, and the
    state ``[S, conv_dim, L]``, any strides, whose columns ``[0, W - 1)`` hold each slot's last inputs, oldest first.
    """

    weight: Tensor
    state: Tensor

    @property
    def width(self) -> int:
        """W."""
        return self.weight.shape[1]
