"""A layer's inputs between its projections, and the float64 formula of it over a few tokens of a row."""

from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.norm.reference import rms_norm_gated

from .gdn_case import Tokens, formula, make_tokens
from .slots import column_slice, poisoned_state

EPS = 1e-6


@dataclass
class Layer:
    """A step's tokens, of which `mixed_qkv` is not convolved yet, and what else the layer brings."""

    tokens: Tokens
    z: Tensor
    conv_weight: Tensor
    norm_weight: Tensor

    def arguments(self) -> tuple[Tensor, ...]:
        x, a, b, A_log, dt_bias = self.tokens.arguments()
        return x, self.z, a, b, self.conv_weight, A_log, dt_bias, self.norm_weight

    def windows(self, slots: int, columns: int, dtype: torch.dtype, layout: str) -> Tensor:
        """A poisoned conv_state."""
        return poisoned_state((slots, self.conv_weight.shape[0], columns), dtype, self.tokens.device, layout)

    def expected(self, start: int, end: int, window: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 of tokens start..end: outputs [n, HV, V], and after each the window [n, conv_dim, W - 1] and the
        state [n, HV, V, K]."""
        t, taps = self.tokens, self.conv_weight.shape[1] - 1
        x = t.mixed_qkv[None, start:end].cpu().double()
        history = window[:, :taps].T[None].cpu().double()
        y, _ = causal_conv(x, self.conv_weight.cpu().double(), history)
        gates = (gate[start:end].cpu() for gate in (t.a, t.b))
        constants = (t.A_log.cpu(), t.dt_bias.cpu(), t.k_heads, t.key_dim, t.value_dim)
        o, states = formula(Tokens(y[0], *gates, *constants), 0, end - start, state, every_state=True)
        normed = rms_norm_gated(o, self.z[start:end].cpu().double(), self.norm_weight.cpu().double(), EPS)
        moved = torch.cat([history, x], dim=1)[0].unfold(0, taps, 1)[1:]
        return normed, moved, states


def make_layer(
    tokens: int,
    device: str,
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.float32,
    width: int = 4,
) -> Layer:
    """As `make_tokens`; mixed_qkv and z are column slices of one projection."""
    made = make_tokens(tokens, device, heads, dims, dtype)
    conv_dim, values = made.mixed_qkv.shape[1], heads[1] * dims[1]
    qkvz = column_slice(tokens, conv_dim + values, dtype, device)
    made.mixed_qkv = qkvz[:, :conv_dim]
    return Layer(
        made,
        z=qkvz[:, conv_dim:].unflatten(-1, (heads[1], dims[1])),
        conv_weight=torch.randn(conv_dim, width, device=device).to(dtype),
        norm_weight=torch.randn(dims[1], device=device).to(dtype),
    )
