"""The formulas of Qwen3-Next's layers over whole sequences ``x [B, T, H]``.

A note on RMSNorm, because popular texts have it wrong: "zero-centred" means that the *weight* is centred on zero,
not the input. The norm is ``x / RMS(x) * (1 + weight)``; no mean is subtracted anywhere. The norm behind the delta
rule is the only one with a plain weight.

Weights come as a mapping from the fused names of ``qwen3next_plugin.weights`` without the layer's prefix.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.config import AttentionSpec, GdnSpec, LayerKind, MoeSpec, Qwen3NextSpec
from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn.reference import delta_rule_chunked, delta_rule_recurrent, gdn_gates, l2_normalize
from qwen3next_plugin.kernels.moe.reference import add_shared_expert, fused_moe, route, swiglu
from qwen3next_plugin.kernels.norm.reference import rms_norm, rms_norm_gated
from qwen3next_plugin.kernels.rope.reference import apply_partial_rotary, sigmoid_gate

from .cache import LayerState

Weights = Mapping[str, Tensor]


def gated_delta_net(
    x: Tensor, w: Weights, gdn: GdnSpec, eps: float, state: LayerState | None = None, delta_rule: str = "auto"
) -> Tensor:
    """Gated DeltaNet (arXiv 2412.06464, figure 1): projections, short convolution, gated delta rule, gated RMSNorm,
    output.

    Args:
        x: ``[B, T, H]``.
        w: the layer's weights, names starting with ``linear_attn.``.
        gdn: the layer's shape.
        eps: of the RMSNorm.
        state: continued from and replaced in place when given.
        delta_rule: ``"chunked"``, ``"recurrent"``, or ``"auto"`` (recurrent for one token, chunked for more).

    Returns:
        ``[B, T, H]``.
    """
    batch, length, _ = x.shape
    heads, key_heads = gdn.num_v_heads, gdn.num_k_heads
    mixed, z = functional.linear(x, w["linear_attn.in_proj_qkvz.weight"]).split([gdn.conv_dim, gdn.value_dim], dim=-1)
    b, a = functional.linear(x, w["linear_attn.in_proj_ba.weight"]).split([heads, heads], dim=-1)

    mixed, conv = causal_conv(mixed, w["linear_attn.conv1d.weight"], state.conv if state else None)
    q, k, v = mixed.split([gdn.key_dim, gdn.key_dim, gdn.value_dim], dim=-1)
    q, k = (l2_normalize(t.reshape(batch, length, key_heads, gdn.head_k_dim)) for t in (q, k))
    q, k = (t.repeat_interleave(gdn.heads_per_group, dim=2) for t in (q, k))
    v = v.reshape(batch, length, heads, gdn.head_v_dim)

    g, beta = gdn_gates(a, b, w["linear_attn.A_log"], w["linear_attn.dt_bias"])
    recurrent = delta_rule == "recurrent" or (delta_rule == "auto" and length == 1)
    rule = delta_rule_recurrent if recurrent else delta_rule_chunked
    o, ssm = rule(q, k, v, g, beta, initial_state=state.ssm if state else None)
    if state is not None:
        state.conv, state.ssm = conv, ssm

    o = rms_norm_gated(o, z.reshape(o.shape), w["linear_attn.norm.weight"], eps)
    return functional.linear(o.reshape(batch, length, gdn.value_dim), w["linear_attn.out_proj.weight"])


def project_qkv(
    x: Tensor, w: Weights, attention: AttentionSpec, eps: float, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, keys, values and output gate of gated attention; norm over each head, then rotary on its first
    ``rotary_dim`` values.

    Args:
        x: ``[B, T, H]``.
        cos, sin: ``[T, rotary_dim / 2]`` at the tokens' positions.

    Returns:
        q ``[B, T, NH, D]``, k and v ``[B, T, NKV, D]``, gate ``[B, T, NH * D]``.
    """
    batch, length, _ = x.shape
    heads, kv_heads, dim = attention.num_heads, attention.num_kv_heads, attention.head_dim
    qg, k, v = functional.linear(x, w["self_attn.qkv_proj.weight"]).split(
        [2 * heads * dim, kv_heads * dim, kv_heads * dim], dim=-1
    )
    q, gate = qg.reshape(batch, length, heads, 2 * dim).split([dim, dim], dim=-1)
    k, v = (t.reshape(batch, length, kv_heads, dim) for t in (k, v))
    q = rms_norm(q, w["self_attn.q_norm.weight"], eps)
    k = rms_norm(k, w["self_attn.k_norm.weight"], eps)
    cos, sin = cos[:, None, :], sin[:, None, :]
    return (
        apply_partial_rotary(q, cos, sin),
        apply_partial_rotary(k, cos, sin),
        v,
        gate.reshape(batch, length, heads * dim),
    )


def gated_attention(
    x: Tensor,
    w: Weights,
    attention: AttentionSpec,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    state: LayerState | None = None,
) -> Tensor:
    """Causal grouped-query attention whose output is multiplied by ``sigmoid(gate)`` (arXiv 2505.06708, gate after
    attention).

    Args:
        x: ``[B, T, H]``.
        w: the layer's weights, names starting with ``self_attn.``.
        cos, sin: ``[T, rotary_dim / 2]`` at the tokens' positions.
        state: continued from and replaced in place when given.

    Returns:
        ``[B, T, H]``.
    """
    q, k, v, gate = project_qkv(x, w, attention, eps, cos, sin)
    if state is not None:
        if state.keys is not None and state.values is not None:
            k, v = torch.cat([state.keys, k], dim=1), torch.cat([state.values, v], dim=1)
        state.keys, state.values = k, v
    groups = attention.num_heads // attention.num_kv_heads
    k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * attention.head_dim**-0.5
    queries, keys = scores.shape[-2:]
    future = torch.ones(queries, keys, dtype=torch.bool, device=x.device).triu(keys - queries + 1)
    wide = scores.float() if scores.dtype != torch.float64 else scores
    weights = wide.masked_fill(future, float("-inf")).softmax(-1).to(v.dtype)
    o = torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(gate.shape)
    return functional.linear(sigmoid_gate(o, gate), w["self_attn.o_proj.weight"])


def mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU: ``down @ (silu(gate @ x) * (up @ x))`` with ``gate_up [2I, H]`` (gate rows first) and ``down [H, I]``."""
    return functional.linear(swiglu(functional.linear(x, gate_up)), down)


def sparse_moe(x: Tensor, w: Weights, moe: MoeSpec) -> Tensor:
    """Routed experts plus the shared expert behind a sigmoid gate: ``sum_e p_e * expert_e(x) + sigmoid(x @ g) *
    shared(x)``.

    Args:
        x: ``[..., H]``.
        w: the layer's weights, names starting with ``mlp.``.

    Returns:
        the shape and dtype of ``x``.
    """
    tokens = x.reshape(-1, x.shape[-1])
    weights, ids = route(functional.linear(tokens, w["mlp.gate.weight"]), moe.top_k, moe.norm_topk_prob)
    routed = fused_moe(tokens, w["mlp.experts.w13"], w["mlp.experts.w2"], weights, ids)
    shared = mlp(tokens, w["mlp.shared_expert.gate_up_proj.weight"], w["mlp.shared_expert.down_proj.weight"])
    return add_shared_expert(routed, shared, tokens, w["mlp.shared_expert_gate.weight"]).reshape(x.shape)


def feed_forward(x: Tensor, w: Weights, spec: Qwen3NextSpec, dense: bool) -> Tensor:
    """The layer's second half: a plain MLP in a dense layer, the sparse mixture in every other."""
    if dense:
        return mlp(x, w["mlp.gate_up_proj.weight"], w["mlp.down_proj.weight"])
    return sparse_moe(x, w, spec.moe)


def decoder_layer(
    x: Tensor,
    w: Weights,
    spec: Qwen3NextSpec,
    kind: LayerKind,
    dense: bool,
    cos: Tensor,
    sin: Tensor,
    state: LayerState | None = None,
    delta_rule: str = "auto",
) -> Tensor:
    """One pre-norm layer: ``x + mixer(norm(x))``, then ``x + feed_forward(norm(x))``; shapes as in the functions
    above."""
    normed = rms_norm(x, w["input_layernorm.weight"], spec.rms_norm_eps)
    if kind == LayerKind.LINEAR:
        x = x + gated_delta_net(normed, w, spec.gdn, spec.rms_norm_eps, state, delta_rule)
    else:
        x = x + gated_attention(normed, w, spec.attention, spec.rms_norm_eps, cos, sin, state)
    return x + feed_forward(rms_norm(x, w["post_attention_layernorm.weight"], spec.rms_norm_eps), w, spec, dense)
