"""Per-head normalisation and partial rotary embedding as formulas: differentiable torch, at least float32 inside."""

import torch

from ..norm.reference import rms_norm


def apply_partial_rotary(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the first 2*R entries of the last dimension, in the half-split (neox) pairing (i, i+R); leave the rest.

    x [..., D], D >= 2*R; cos and sin [..., R] broadcast against x's leading dimensions (for x [T, heads, D] give
    [T, 1, R]). The result has x's dtype. Su et al., RoFormer, 2021, section 3.2.2, with GPT-NeoX's pairing.
    """
    half = cos.shape[-1]
    dtype = torch.promote_types(x.dtype, cos.dtype)
    first, second, rest = x.split([half, half, x.shape[-1] - 2 * half], dim=-1)
    first, second, cos, sin = first.to(dtype), second.to(dtype), cos.to(dtype), sin.to(dtype)
    rotated = torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)
    return torch.cat([rotated.to(x.dtype), rest], dim=-1)


def qk_norm_rope(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a fused projection, normalise q and k per head (zero-centred weight) and rotate them.

    qkv [T, 2*NH*D + 2*NKV*D]: per query head q then gate, then k, then v; cos_sin [P, R] = cos half | sin half.
    Returns q [T, NH*D], k [T, NKV*D], v [T, NKV*D], gate [T, NH*D] in qkv's dtype. Norm and rotation are one step:
    nothing is rounded between them.
    """
    tokens = qkv.shape[0]
    query_gate, k, v = qkv.split([2 * num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], dim=-1)
    q, gate = query_gate.reshape(tokens, num_heads, 2, head_dim).unbind(dim=2)
    cos, sin = cos_sin[positions].unsqueeze(1).chunk(2, dim=-1)
    dtype = torch.promote_types(qkv.dtype, torch.float32)

    def norm_rope(heads: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        y = apply_partial_rotary(rms_norm(heads.to(dtype), weight, eps), cos, sin)
        return y.to(qkv.dtype).flatten(1)

    k = k.reshape(tokens, num_kv_heads, head_dim)
    return norm_rope(q, q_weight), norm_rope(k, k_weight), v, gate.flatten(1)


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    first_slot: int,
) -> None:
    """Keys and values [T, NKV * D] into slots [N <= T] of caches [pages, page_size, NKV, D], below the first none."""
    tokens = (slots >= first_slot).nonzero().squeeze(1)
    pages, places = slots[tokens] // key_cache.shape[1], slots[tokens] % key_cache.shape[1]
    for new, cache in ((key, key_cache), (value, value_cache)):
        cache[pages, places] = new[tokens].unflatten(1, cache.shape[2:]).to(cache.dtype)


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(gate), elementwise, in x's dtype: the output gate of full attention."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    return (x.to(dtype) * torch.sigmoid(gate.to(dtype))).to(x.dtype)
