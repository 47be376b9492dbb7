"""SGLang's norms, rotation and FP8 linear layers, as its stock model runs them on a Hopper GPU (0.5.20)."""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor
from torch.nn import functional

from ..layer_work import DenseInputs, NormAbout, NormInputs, RopeAbout, RopeInputs
from ..work import Prepared, Work
from . import named
from .sglang_context import publish

_FP8 = "sglang.srt.layers.quantization.fp8_utils"


def norm(work: Work) -> list[Prepared]:
    """The kernel that adds and normalises in place, zero-centred as the weight is stored."""
    about: NormAbout = work.about
    kernel = named("sgl_kernel:gemma_fused_add_rmsnorm")

    def run(one: NormInputs) -> Tensor:
        kernel(one.x, one.residual, about.weight, about.eps)
        return one.x

    return [Prepared([partial(run, one) for one in work.inputs])]


def rope(work: Work) -> list[Prepared]:
    """q and gate copied apart, two norms, the rotation in place, and the kernel that writes into the pool."""
    about: RopeAbout = work.about
    s, norm_heads = about.sizes, named("sgl_kernel:gemma_rmsnorm")
    turn = named("sglang.kernels.ops.attention.rope:apply_rope_with_cos_sin_cache_inplace")
    write, row = named("sglang.kernels.ops.kvcache.kvcache:store_cache"), s.num_kv_heads * s.head_dim
    widths = [2 * s.num_heads * s.head_dim, row, row]

    def run(one: RopeInputs) -> Tensor:
        qkv = one.qkv
        q_gate, k, v = qkv.split(widths, dim=-1)
        q, gate = q_gate.view(-1, s.num_heads, 2 * s.head_dim).chunk(2, dim=-1)
        q, gate = q.reshape(qkv.shape[0], -1), gate.reshape(qkv.shape[0], -1)
        q, k = (
            norm_heads(part.reshape(-1, s.head_dim), weight, about.eps).view(part.shape[0], -1, s.head_dim)
            for part, weight in ((q, about.q_weight), (k, about.k_weight))
        )
        turn(
            positions=about.positions,
            q=q[..., : s.rotary_dim],
            k=k[..., : s.rotary_dim],
            cos_sin_cache=about.cos_sin,
            is_neox=True,
        )
        write(k.view(-1, row), v, one.keys.view(-1, row), one.values.view(-1, row), about.slots, row_bytes=2 * row)
        return q.flatten(1)

    return [Prepared([partial(run, one) for one in work.inputs])]


def _dense(work: Work, product: Callable[..., Any] | None) -> list[Prepared]:
    def run(one: DenseInputs) -> Tensor:
        if one.scale_inv is None or product is None:
            return functional.linear(one.x, one.weight)
        out: Tensor = product(one.x, one.weight, [128, 128], one.scale_inv)
        return out

    return [Prepared([partial(run, one) for one in work.inputs])]


def dense(work: Work) -> list[Prepared]:
    """What SGLang picks for FP8 blocks: DeepGEMM on Hopper where it is there."""
    publish()
    found = named(f"{_FP8}:dispatch_w8a8_block_fp8_linear")()
    quantised = work.inputs[0].quantised
    prepared = _dense(work, found if quantised else None)
    prepared[0].facts["picked"] = found.__name__ if quantised else "torch's linear"
    return prepared


def dense_triton(work: Work) -> list[Prepared]:
    """SGLang's Triton kernel (--fp8-gemm-backend triton)."""
    if not work.inputs[0].quantised:
        raise ValueError("the router is not quantised")
    publish()
    return _dense(work, named(f"{_FP8}:triton_w8a8_block_fp8_linear"))
