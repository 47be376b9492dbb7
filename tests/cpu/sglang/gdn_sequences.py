"""Two linear layers, what their requests have seen, and the float64 formula of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention

from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn.reference import delta_rule_chunked, gdn_gates, l2_normalize
from qwen3next_plugin.kernels.gdn.step import GdnParameters
from qwen3next_plugin.kernels.norm.reference import rms_norm_gated

K_HEADS, V_HEADS, KEY_DIM, VALUE_DIM, WIDTH = 1, 2, 8, 4, 4
CONV_DIM = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
LINEAR_LAYERS, FULL_LAYER = (0, 2), 1

Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""qkvz [T, CONV_DIM + V_HEADS * VALUE_DIM], a and b [T, V_HEADS]: bfloat16 values, so that a window in bfloat16 is
exact."""


def make_inputs(tokens: int) -> Inputs:
    """Random inputs, the gates cut from one projection as our layer cuts them."""
    qkvz = torch.randn(tokens, CONV_DIM + V_HEADS * VALUE_DIM).bfloat16().float()
    gates = torch.randn(tokens, 2 * V_HEADS)
    return qkvz, gates[:, V_HEADS:], gates[:, :V_HEADS]


@dataclass
class History:
    """The inputs a request has seen so far, a layer."""

    inputs: dict[int, Inputs] = field(default_factory=lambda: {layer: make_inputs(0) for layer in LINEAR_LAYERS})

    def __len__(self) -> int:
        return len(self.inputs[LINEAR_LAYERS[0]][0])

    def extend(self, more: Mapping[int, Inputs]) -> None:
        for layer, parts in more.items():
            self.inputs[layer] = join(self.inputs[layer], parts)


@dataclass(frozen=True)
class Expected:
    """Float64: out [T, V_HEADS, VALUE_DIM], normed and gated; window [CONV_DIM, WIDTH - 1]; state [V_HEADS, VALUE_DIM,
    KEY_DIM]."""

    out: torch.Tensor
    window: torch.Tensor
    state: torch.Tensor


def formula(layer: RadixLinearAttention, inputs: Inputs) -> Expected:
    """A whole sequence from nothing, in chunks: in float64 as good as token by token, and far faster."""
    qkvz, a, b = (part.double() for part in inputs)
    qkv, z = qkvz[:, :CONV_DIM], qkvz[:, CONV_DIM:].unflatten(-1, (V_HEADS, VALUE_DIM))
    parameters = layer.core_parameters()
    convolved, window = causal_conv(qkv[None], parameters.conv_weight.double())
    q, k, v = convolved.split([K_HEADS * KEY_DIM, K_HEADS * KEY_DIM, V_HEADS * VALUE_DIM], dim=-1)
    q, k = (
        l2_normalize(part.unflatten(-1, (K_HEADS, KEY_DIM))).repeat_interleave(V_HEADS // K_HEADS, dim=-2)
        for part in (q, k)
    )
    g, beta = gdn_gates(a[None], b[None], parameters.A_log.double(), parameters.dt_bias.double())
    out, state = delta_rule_chunked(q, k, v.unflatten(-1, (V_HEADS, VALUE_DIM)), g, beta)
    normed = rms_norm_gated(out[0], z, parameters.norm_weight.double(), parameters.norm_eps)
    return Expected(normed, window[0].T, state[0])


def make_layer(layer: int) -> RadixLinearAttention:
    """SGLang's part of our layer, with random parameters."""
    parameters = GdnParameters(
        conv_weight=torch.randn(CONV_DIM, WIDTH),
        A_log=torch.randn(V_HEADS) * 0.5,
        dt_bias=torch.randn(V_HEADS),
        norm_weight=torch.randn(VALUE_DIM),
        norm_eps=1e-6,
        num_k_heads=K_HEADS,
    )
    attn = RadixLinearAttention(
        layer_id=layer,
        num_q_heads=K_HEADS,
        num_k_heads=K_HEADS,
        num_v_heads=V_HEADS,
        head_q_dim=KEY_DIM,
        head_k_dim=KEY_DIM,
        head_v_dim=VALUE_DIM,
    )
    attn.core_parameters = lambda: parameters
    return attn


def cut(inputs: Inputs, part: slice) -> Inputs:
    qkvz, a, b = inputs
    return qkvz[part], a[part], b[part]


def join(before: Inputs, after: Inputs) -> Inputs:
    qkvz, a, b = (torch.cat(pair) for pair in zip(before, after, strict=True))
    return qkvz, a, b
