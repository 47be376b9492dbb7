"""QK-norm with partial rotary embedding, and the output gate, in Triton; float32 inside."""

import torch
import triton
import triton.language as tl
from triton.language.extra import cuda

from ..early import begins_early, launch_options
from ..integers import cdiv, next_power_of_2


@triton.jit
def _norm_rope_head(head_ptr, weight_ptr, cos_sin_ptr, head_dim, rotary_dim, eps, BLOCK_D: tl.constexpr):
    """One head [D], normalised, its first rotary_dim entries turned, i with i + rotary_dim / 2; float32."""
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
    return y * cos + tl.where(low, -y_partner, y_partner) * sin


# Positions and slots may be any slice of a step's, and are read one by one.
@triton.jit(
    do_not_specialize=["positions_stride", "num_slots", "first_slot", "page_size"],
    do_not_specialize_on_alignment=["positions_ptr", "slots_ptr"],
)
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
    key_cache_ptr,
    value_cache_ptr,
    slots_ptr,
    num_slots,
    first_slot,
    page_size,
    page_stride,
    slot_stride,
    head_stride,
    qkv_stride,
    cos_sin_stride,
    positions_stride,
    head_dim,
    rotary_dim,
    eps,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WRITES: tl.constexpr,
    EARLY: tl.constexpr,
):
    """One program a token and head; a query head brings its gate along, a key head its value head.

    WRITES: keys and values go to their slots of a cache, too; the strides are those of both its tensors.
    """
    if EARLY:
        cuda.gdc_wait()
        cuda.gdc_launch_dependents()
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    row = qkv_ptr + token * qkv_stride
    angles = cos_sin_ptr + tl.load(positions_ptr + token * positions_stride) * cos_sin_stride
    cols = tl.arange(0, BLOCK_D)
    inside = cols < head_dim
    if head < NUM_HEADS:
        source = row + head * 2 * head_dim
        target = (token * NUM_HEADS + head) * head_dim + cols
        q = _norm_rope_head(source, q_weight_ptr, angles, head_dim, rotary_dim, eps, BLOCK_D)
        tl.store(q_ptr + target, q.to(q_ptr.dtype.element_ty), mask=inside)
        tl.store(gate_ptr + target, tl.load(source + head_dim + cols, mask=inside), mask=inside)
    else:
        kv_head = head - NUM_HEADS
        source = row + (2 * NUM_HEADS + kv_head) * head_dim
        target = (token * NUM_KV_HEADS + kv_head) * head_dim + cols
        k = _norm_rope_head(source, k_weight_ptr, angles, head_dim, rotary_dim, eps, BLOCK_D).to(k_ptr.dtype.element_ty)
        v = tl.load(source + NUM_KV_HEADS * head_dim + cols, mask=inside)
        tl.store(k_ptr + target, k, mask=inside)
        tl.store(v_ptr + target, v, mask=inside)
        if WRITES:
            if token < num_slots:
                slot = tl.load(slots_ptr + token)
                if slot >= first_slot:
                    place = slot // page_size * page_stride + slot % page_size * slot_stride + kv_head * head_stride
                    tl.store(key_cache_ptr + place + cols, k, mask=inside)
                    tl.store(value_cache_ptr + place + cols, v, mask=inside)


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
    gate: torch.Tensor | None = None,
    cache: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None,
    first_slot: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `kernels.rope.qk_norm_rope` and, with a gate to fill and a cache, `qk_norm_rope_write`.

    cache: its keys, its values and the tokens' slots. The arguments are taken as checked.
    """
    qkv = qkv if qkv.stride(1) == 1 else qkv.contiguous()
    cos_sin = cos_sin if cos_sin.stride(1) == 1 else cos_sin.contiguous()
    tokens = qkv.shape[0]
    q = qkv.new_empty(tokens, num_heads * head_dim)
    k = qkv.new_empty(tokens, num_kv_heads * head_dim)
    v, gate = torch.empty_like(k), torch.empty_like(q) if gate is None else gate
    if tokens == 0:
        return q, k, v, gate
    if cache is None:  # whose arguments are not looked at then
        written: tuple[torch.Tensor | int, ...] = (k, v, positions, 0, 0, 0, 0, 0, 0)
    else:
        keys, _, slots = cache
        written = (*cache, slots.shape[0], first_slot, keys.shape[1], *keys.stride()[:3])
    early = begins_early(qkv.device, tokens)
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
        *written,
        qkv.stride(0),
        cos_sin.stride(0),
        positions.stride(0),
        head_dim,
        cos_sin.shape[1],
        eps,
        NUM_HEADS=num_heads,
        NUM_KV_HEADS=num_kv_heads,
        BLOCK_D=next_power_of_2(head_dim),
        WRITES=cache is not None,
        EARLY=early,
        num_warps=1 if head_dim <= 128 else 2,
        **launch_options(early),
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
