"""What adapters share: the checkpoint's order taken apart, a gated norm, what stock models give to torch.compile."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from qwen3next_plugin.spec import GdnSpec

from ..gdn_work import GdnAbout


@functools.cache
def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` through torch.compile, as stock models are; one that every case of a run shares."""
    return torch.compile(function)


def split_interleaved(qkvz: Tensor, ba: Tensor, sizes: GdnSpec) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The checkpoint's order -> q | k | v [T, conv_dim], z [T, HV, V], b and a [T, HV], each in memory of its own."""
    group = sizes.num_v_heads // sizes.num_k_heads
    widths = [sizes.head_k_dim, sizes.head_k_dim, group * sizes.head_v_dim, group * sizes.head_v_dim]
    heads = qkvz.unflatten(-1, (sizes.num_k_heads, sum(widths)))
    q, k, v, z = heads.split(widths, dim=-1)
    b, a = ba.unflatten(-1, (sizes.num_k_heads, 2 * group)).split([group, group], dim=-1)
    mixed = torch.cat([part.flatten(1) for part in (q, k, v)], dim=-1)
    z = z.reshape(z.shape[0], sizes.num_v_heads, sizes.head_v_dim)
    return mixed, z, b.reshape(b.shape[0], -1), a.reshape(a.shape[0], -1)


def gated_norm(x: Tensor, z: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / RMS(x) * silu(z) over the last dimension, float32 inside."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps) * weight.float()
    return (wide * functional.silu(z.float())).to(x.dtype)


def heads_of(mixed: Tensor, about: GdnAbout) -> tuple[Tensor, Tensor, Tensor]:
    """Views q, k [T, HK, K] and v [T, HV, V] of the convolution's output."""
    g = about.sizes
    q, k, v = mixed.split([g.key_dim, g.key_dim, g.value_dim], dim=-1)
    q, k = (part.unflatten(-1, (g.num_k_heads, g.head_k_dim)) for part in (q, k))
    return q, k, v.unflatten(-1, (g.num_v_heads, g.head_v_dim))


def flashinfer_decode(mixed: Tensor, a: Tensor, b: Tensor, about: GdnAbout, states: Tensor, slots: Tensor) -> Tensor:
    """FlashInfer's decode kernel -> [N, HV, V]; it wants float32 states gathered, and bf16 ones where they are."""
    from . import named

    kernel = named("flashinfer.gdn_decode:gated_delta_rule_decode_pretranspose")
    p = about.parameters
    q, k, v = (part.contiguous()[:, None] for part in heads_of(mixed, about))
    gates = {"A_log": p.A_log, "a": a[:, None], "dt_bias": p.dt_bias, "b": b[:, None], "use_qk_l2norm": True}
    if states.dtype is torch.bfloat16:
        pool = {"state": None, "initial_state": states, "initial_state_indices": slots}
        return kernel(q=q, k=k, v=v, **pool, **gates)[0].squeeze(1)
    out, new = kernel(q=q, k=k, v=v, state=states[slots.long()], **gates)
    states[slots.long()] = new
    return out.squeeze(1)
