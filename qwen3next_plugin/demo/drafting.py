"""The MTP losses: the layer applied to its own results, each step seeing exactly what it will see when drafting.

When an engine drafts behind position s, the layer's first step reads keys that it made from the decoder's hidden
states up to s; the later steps add keys made from its own results. Training over all s at once therefore needs, in
step d, a causal part (the keys of the first step) and d - 1 further keys that belong to s alone.
"""

import torch
from torch import Tensor

from qwen3next_plugin.kernels.norm.reference import rms_norm
from qwen3next_plugin.kernels.rope.reference import sigmoid_gate
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.reference.layers import feed_forward, project_qkv

MTP_LAYER = "mtp.layers.0."


def draft_hidden(
    model: ReferenceModel, hidden: Tensor, tokens: Tensor, depth: int, wanted: Tensor | None = None
) -> list[Tensor]:
    """Hidden states of ``depth`` successive MTP steps from every position, fed with the true tokens.

    Args:
        hidden: the decoder's ``[B, T, H]`` for ``tokens[:, :T]``.
        tokens: ``[B, N]`` with N > T + depth - 1.
        depth: steps, at least 1.
        wanted: ``[B, T]`` bool: rows that are needed; the feed-forward part of all others is left out, and what is
            returned for them means nothing. All if None.

    Returns:
        for each step d (from 0) ``[B, T, H]``, whose row s predicts ``tokens[:, s + d + 2]``; step 0 is
            ``ReferenceModel.mtp``.
    """
    weights, spec = model.layer(MTP_LAYER), model.spec
    eps, length = spec.rms_norm_eps, hidden.shape[1]
    groups = spec.attention.num_heads // spec.attention.num_kv_heads
    future = torch.ones(length, length, dtype=torch.bool, device=hidden.device).triu(1)
    shared: tuple[Tensor, Tensor] | None = None
    own: list[tuple[Tensor, Tensor]] = []
    results = []
    for step in range(depth):
        x = model.mtp_input(hidden, tokens[:, step + 1 : step + 1 + length])
        normed = rms_norm(x, weights["input_layernorm.weight"], eps)
        cos, sin = model.rotary(step, length)
        q, k, v, gate = project_qkv(normed, weights, spec.attention, eps, cos, sin)
        k, v = (t.repeat_interleave(groups, dim=2) for t in (k, v))
        if shared is None:
            shared = (k, v)
        else:
            own.append((k, v))
        scale = spec.attention.head_dim**-0.5
        scores = (torch.einsum("bqhd,bkhd->bhqk", q, shared[0]) * scale).masked_fill(future, float("-inf"))
        alone = [(q * key).sum(-1).transpose(1, 2)[..., None] * scale for key, _ in own]
        mass = torch.cat([scores, *alone], dim=-1).softmax(-1)
        o = torch.einsum("bhqk,bkhd->bqhd", mass[..., :length], shared[1])
        for i, (_, value) in enumerate(own):
            o = o + mass[..., length + i].transpose(1, 2)[..., None] * value
        x = x + sigmoid_gate(o.reshape(gate.shape), gate) @ weights["self_attn.o_proj.weight"].T
        rows = x[wanted] if wanted is not None else x
        normed = rms_norm(rows, weights["post_attention_layernorm.weight"], eps)
        answer = feed_forward(normed, weights, spec, dense=False)
        x = x.masked_scatter(wanted[..., None], rows + answer) if wanted is not None else rows + answer
        hidden = rms_norm(x, model.weights["mtp.norm.weight"], eps)
        results.append(hidden)
    return results
