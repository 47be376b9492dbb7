"""Before and after full attention: norms, partial rotary embedding, the write into the cache, the output gate."""

from typing import Any

import torch

from .. import dispatch
from . import reference

dispatch.declare("qk_norm_rope", cuda=(dispatch.Choice("caches of another dtype or layout, which the engine writes"),))
dispatch.declare(
    "qk_norm_rope_write", cuda=(dispatch.Choice("caches of the activations' dtype, written in the same launch"),)
)
dispatch.declare("sigmoid_gate")


def _check(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    width = 2 * (num_heads + num_kv_heads) * head_dim
    if qkv.dim() != 2 or qkv.shape[1] != width:
        raise ValueError(
            f"qk_norm_rope: qkv is {list(qkv.shape)}; with {num_heads} heads (q and gate), {num_kv_heads} kv heads and "
            f"head_dim {head_dim} it must be [T, {width}]"
        )
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if list(weight.shape) != [head_dim]:
            raise ValueError(f"qk_norm_rope: {name} is {list(weight.shape)}; it must be [{head_dim}]")
    if cos_sin.dim() != 2 or cos_sin.shape[1] % 2 or not 0 < cos_sin.shape[1] <= head_dim:
        raise ValueError(
            f"qk_norm_rope: cos_sin is {list(cos_sin.shape)}; it must be [P, rotary_dim], rotary_dim even and at most "
            f"head_dim {head_dim}"
        )
    if positions.shape != qkv.shape[:1] or positions.dtype != torch.int64:
        raise ValueError(
            f"qk_norm_rope: positions is {list(positions.shape)} {positions.dtype}; it must be [{qkv.shape[0]}] int64"
        )


def _qk_norm_rope_fake(
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
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, q_size, kv_size = qkv.shape[0], num_heads * head_dim, num_kv_heads * head_dim
    return (
        qkv.new_empty(tokens, q_size),
        qkv.new_empty(tokens, kv_size),
        qkv.new_empty(tokens, kv_size),
        qkv.new_empty(tokens, q_size),
    )


@dispatch.custom_op(fake=_qk_norm_rope_fake)
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
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Split a fused projection into q, k, v, gate; normalise q and k per head, rotate their first rotary_dim entries.

    qkv [T, 2*NH*D + 2*NKV*D] bf16/fp16/fp32 (per query head q then gate, then k, then v; rows may be strided),
    q_weight and k_weight [D] zero-centred, cos_sin [P, rotary_dim] float32 = cos half | sin half, positions [T] int64,
    each in [0, P). Returns q [T, NH*D], k [T, NKV*D], v [T, NKV*D], gate [T, NH*D], contiguous copies in qkv's dtype;
    norm and rotation run in float32 with no rounding between. Raises ValueError for shapes that do not fit.
    Su et al., RoFormer, 2021, section 3.2.2, with GPT-NeoX's pairing (i, i + rotary_dim/2).
    """
    _check(qkv, q_weight, k_weight, cos_sin, positions, num_heads, num_kv_heads, head_dim)
    sizes: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if dispatch.choose(qkv, backend) == dispatch.REFERENCE:
        q, k, v, gate = reference.qk_norm_rope(qkv, q_weight, k_weight, cos_sin, positions, **sizes, eps=eps)
        # v and gate are views of qkv, which a custom op must not return
        copied = {"memory_format": torch.contiguous_format}
        return q.contiguous(), k.contiguous(), v.clone(**copied), gate.clone(**copied)
    from . import triton

    return triton.qk_norm_rope(qkv, q_weight, k_weight, cos_sin, positions, **sizes, eps=eps)


def _check_cache(
    qkv: torch.Tensor,
    gate: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
) -> None:
    heads = [num_kv_heads, head_dim]
    if key_cache.dim() != 4 or list(key_cache.shape[2:]) != heads or key_cache.stride(3) != 1:
        raise ValueError(
            f"qk_norm_rope_write: key_cache is {list(key_cache.shape)}, strides {list(key_cache.stride())}; it must be "
            f"[pages, page_size, {num_kv_heads}, {head_dim}] with entries of a head side by side"
        )
    if value_cache.shape != key_cache.shape or value_cache.stride() != key_cache.stride():
        raise ValueError(
            f"qk_norm_rope_write: value_cache is {list(value_cache.shape)}, strides {list(value_cache.stride())}; both "
            f"must be those of key_cache, {list(key_cache.shape)} and {list(key_cache.stride())}"
        )
    if not qkv.dtype == gate.dtype == key_cache.dtype == value_cache.dtype:
        raise ValueError(
            f"qk_norm_rope_write: gate is {gate.dtype}, key_cache {key_cache.dtype}, value_cache {value_cache.dtype}; "
            f"all must be of qkv's dtype, {qkv.dtype}"
        )
    if list(gate.shape) != [qkv.shape[0], num_heads * head_dim] or not gate.is_contiguous():
        raise ValueError(
            f"qk_norm_rope_write: gate is {list(gate.shape)}, strides {list(gate.stride())}; it must be contiguous, "
            f"[{qkv.shape[0]}, {num_heads * head_dim}]"
        )
    if slots.dim() != 1 or slots.shape[0] > qkv.shape[0] or slots.dtype != torch.int64 or not slots.is_contiguous():
        raise ValueError(
            f"qk_norm_rope_write: slots is {list(slots.shape)} {slots.dtype}; it must be contiguous int64, at most "
            f"{qkv.shape[0]} of them"
        )


def _qk_norm_rope_write_fake(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    gate: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    first_slot: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    tokens, kv_size = qkv.shape[0], num_kv_heads * head_dim
    return qkv.new_empty(tokens, num_heads * head_dim), qkv.new_empty(tokens, kv_size), qkv.new_empty(tokens, kv_size)


@dispatch.custom_op(fake=_qk_norm_rope_write_fake, mutates_args=("gate", "key_cache", "value_cache"))
def qk_norm_rope_write(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    cos_sin: torch.Tensor,
    positions: torch.Tensor,
    gate: torch.Tensor,
    key_cache: torch.Tensor,
    value_cache: torch.Tensor,
    slots: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    eps: float,
    first_slot: int = 0,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`qk_norm_rope` that also writes keys and values into a paged cache, and the gate where it is told to.

    gate [T, NH*D], contiguous, is filled. key_cache and value_cache [pages, page_size, NKV, D] of qkv's dtype, with the
    same strides, a head's entries side by side: page s // page_size, place s % page_size takes the token of slot s.
    slots [N] int64, N <= T, no two alike but for padding: tokens from N on and those of slots below ``first_slot``
    (0 or more), which are written nowhere; slots are not checked against the cache's size. Returns q [T, NH*D], k and v
    [T, NKV*D]. Raises ValueError for shapes, strides or dtypes that do not fit. Kwon et al., PagedAttention, 2023,
    section 4.1.
    """
    _check(qkv, q_weight, k_weight, cos_sin, positions, num_heads, num_kv_heads, head_dim)
    if first_slot < 0:
        raise ValueError(f"qk_norm_rope_write: first_slot is {first_slot}; it must be 0 or more")
    _check_cache(qkv, gate, key_cache, value_cache, slots, num_heads, num_kv_heads, head_dim)
    sizes: dict[str, Any] = {"num_heads": num_heads, "num_kv_heads": num_kv_heads, "head_dim": head_dim}
    if dispatch.choose(qkv, backend) == dispatch.REFERENCE:
        q, k, v, gates = reference.qk_norm_rope(qkv, q_weight, k_weight, cos_sin, positions, **sizes, eps=eps)
        gate.copy_(gates)
        reference.write_cache(k, v, key_cache, value_cache, slots, first_slot)
        return q.contiguous(), k.contiguous(), v.clone(memory_format=torch.contiguous_format)
    from . import triton

    cache = (key_cache, value_cache, slots)
    q, k, v, _ = triton.qk_norm_rope(
        qkv, q_weight, k_weight, cos_sin, positions, **sizes, eps=eps, gate=gate, cache=cache, first_slot=first_slot
    )
    return q, k, v


def _sigmoid_gate_fake(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    return x.new_empty(x.shape)


@dispatch.custom_op(fake=_sigmoid_gate_fake)
def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor, *, backend: str | None = None) -> torch.Tensor:
    """x * sigmoid(gate), float32 inside; x and gate of one shape and dtype, any strides. Returns a contiguous tensor.

    Raises ValueError for shapes or dtypes that differ. Qiu et al., Gated Attention for Large Language Models, 2025.
    """
    if x.shape != gate.shape or x.dtype != gate.dtype or x.dim() < 1:
        raise ValueError(
            f"sigmoid_gate: x and gate must agree and have a dimension, but are {list(x.shape)} {x.dtype} and "
            f"{list(gate.shape)} {gate.dtype}"
        )
    if dispatch.choose(x, backend) == dispatch.REFERENCE:
        return reference.sigmoid_gate(x, gate).contiguous()
    from . import triton

    return triton.sigmoid_gate(x, gate)
