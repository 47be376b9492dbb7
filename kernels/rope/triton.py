"""QK-norm with partial rotary embedding, and the output gate, in Triton; float32 inside."""

import torch
import triton
import triton.language as tl

from ..integers import cdiv, next_power_of_2


@triton.jit
def _norm_rope_head(head_ptr, weight_ptr, out_ptr, cos_sin_ptr, head_dim, rotary_dim, eps, BLOCK_D: tl.constexpr):
    """Normalise one head [D] and rotate its first rotary_dim entries, pairing i with i + rotary_dim / 2."""
    cols = tl.arange(0, BLOCK_D)
    inside = cols < head_dim
    rotated = cols < rotary_dim
    half = rotary_dim // 2
    low = cols < half
    partner = tl.where(low, cols + half, cols - half)
    # the partner's value is read again rather than moved across lanes: the row is in the L1 cache by then
    x = tl.load(head_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    x_partner = tl.load(head_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    weight_partner = tl.load(weight_ptr + partner, mask=rotated, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, axis=0) / head_dim + eps)
    y = x * scale * (1.0 + weight)
    y_partner = x_partner * scale * (1.0 + weight_partner)
    angle = tl.where(low, cols, cols - half)
    cos = tl.load(cos_sin_ptr + angle, mask=rotated, other=1.0).to(tl.float32)
    sin = tl.load(cos_sin_ptr + half + angle, mask=rotated, other=0.0).to(tl.float32)
    y = y * cos + tl.where(low, -y_partner, y_partner) * sin
    tl.store(out_ptr + cols, y.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _copy_head(source_ptr, out_ptr, head_dim, BLOCK_D: tl.constexpr):
    cols = tl.arange(0, BLOCK_D)
    tl.store(out_ptr + cols, tl.load(source_ptr + cols, mask=cols < head_dim), mask=cols < head_dim)


# Positions may be any slice of a step's, and are read one by one.
@triton.jit(do_not_specialize=["positions_stride"], do_not_specialize_on_alignment=["positions_ptr"])
def _qk_norm_rope_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_sin_ptr,
    positions_ptr,
    q_ptr,
    k_ptr,
    v_ptr,
    gate_ptr,
    qkv_stride,
    cos_sin_stride,
    positions_stride,
    head_dim,
    rotary_dim,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """One program a token and head; a query head brings its gate along, a key head its value head."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = qkv_ptr + token * qkv_stride
    angles = cos_sin_ptr + tl.load(positions_ptr + token * positions_stride) * cos_sin_stride
    if head < NUM_HEADS:
        source = row + head * 2 * head_dim
        target = (token * NUM_HEADS + head) * head_dim
        _norm_rope_head(source, q_weight_ptr, q_ptr + target, angles, head_dim, rotary_dim, eps, BLOCK_D)
        _copy_head(source + head_dim, gate_ptr + target, head_dim, BLOCK_D)
    else:
        kv_head = head - NUM_HEADS
        source = row + (2 * NUM_HEADS + kv_head) * head_dim
        target = (token * NUM_KV_HEADS + kv_head) * head_dim
        _norm_rope_head(source, k_weight_ptr, k_ptr + target, angles, head_dim, rotary_dim, eps, BLOCK_D)
        _copy_head(source + NUM_KV_HEADS * head_dim, v_ptr + target, head_dim, BLOCK_D)


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
    """See `kernels.rope.qk_norm_rope`; the arguments are taken as checked."""
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    cos_sin = cos_sin if cos_sin.stride(1) == 1 else cos_sin.contiguous()
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_heads * head_dim)
    k = qkv.new_empty(tokens, num_kv_heads * head_dim)
    v, gate = torch.empty_like(k), torch.empty_like(q)
    if tokens == 0:
        return q, k, v, gate
    _qk_norm_rope_kernel[(tokens, num_heads + num_kv_heads)](
        qkv,
        q_weight.contiguous(),
        k_weight.contiguous(),
        cos_sin,
        positions,
        q,
        k,
        v,
        gate,
        qkv.stride(0),
        cos_sin.stride(0),
        positions.stride(0),
        head_dim,
        cos_sin.shape[1],
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_D=next_power_of_2(head_dim),
        num_warps=1 if head_dim <= 128 else 2,
    )
    return q, k, v, gate


@triton.jit
def _sigmoid_gate_kernel(x_ptr, gate_ptr, out_ptr, num_cols, x_stride, gate_stride, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = cols < num_cols
    x = tl.load(x_ptr + row * x_stride + cols, mask=mask).to(tl.float32)
    gate = tl.load(gate_ptr + row * gate_stride + cols, mask=mask).to(tl.float32)
    tl.store(out_ptr + row * num_cols + cols, (x * tl.sigmoid(gate)).to(out_ptr.dtype.element_ty), mask=mask)


def sigmoid_gate(x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """See `kernels.rope.sigmoid_gate`; the arguments are taken as checked."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if out.numel() == 0:
        return out
    num_cols = x.shape[-1]
    x, gate = (t.reshape(-1, num_cols) for t in (x, gate))
    x, gate = (t if t.stride(1) == 1 else t.contiguous() for t in (x, gate))
    block = min(1024, next_power_of_2(num_cols))
    _sigmoid_gate_kernel[(x.shape[0], cdiv(num_cols, block))](
        x, gate, out, num_cols, x.stride(0), gate.stride(0), BLOCK=block
    )
    return out
