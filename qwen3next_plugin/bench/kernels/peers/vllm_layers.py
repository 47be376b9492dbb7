"""vLLM's norms, rotation and FP8 linear layers, as its stock model runs them on a Hopper GPU (0.32)."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from ..layer_work import DenseInputs, NormAbout, NormInputs, RopeAbout, RopeInputs
from ..work import Prepared, Work
from . import named
from .common import compiled

_FP8 = "vllm.model_executor.layers.quantization.utils.fp8_utils"
_BLOCK = 128


def norm(work: Work) -> list[Prepared]:
    """The CUDA kernel that adds and normalises in place, with the weight plus one made before."""
    about: NormAbout = work.about
    kernel, weight = named("vllm._custom_ops:fused_add_rms_norm"), (about.weight.float() + 1.0).to(about.weight.dtype)

    def run(one: NormInputs) -> Tensor:
        kernel(one.x, one.residual, weight, about.eps)
        return one.x

    return [Prepared([partial(run, one) for one in work.inputs])]


def _add_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x.float() + residual.float()
    normed = total * torch.rsqrt(total.square().mean(-1, keepdim=True) + eps) * (weight.float() + 1.0)
    return normed.to(x.dtype), total.to(x.dtype)


def norm_compiled(work: Work) -> list[Prepared]:
    """The formula through torch.compile, as vLLM's default compilation mode has it."""
    about: NormAbout = work.about
    formula = compiled(_add_and_norm)

    def run(one: NormInputs) -> Tensor:
        out: Tensor = formula(one.x, one.residual, about.weight, about.eps)[0]
        return out

    return [Prepared([partial(run, one) for one in work.inputs])]


def rope(work: Work) -> list[Prepared]:
    """The fused kernel of norms, rotation and gate, then that of the cache; cos and sin are kept in bf16."""
    about: RopeAbout = work.about
    s, kernel = about.sizes, named("vllm.model_executor.layers.fused_qk_norm_rope:fused_qk_rmsnorm_rope_gate")
    write, scale = named("vllm._custom_ops:reshape_and_cache_flash"), torch.ones((), device=about.positions.device)
    cos_sin = about.cos_sin.bfloat16()
    widths = [2 * s.num_heads * s.head_dim, s.num_kv_heads * s.head_dim, s.num_kv_heads * s.head_dim]

    def run(one: RopeInputs) -> Tensor:
        q_gate, k, v = one.qkv.split(widths, dim=-1)
        q, k, _ = kernel(
            q_gate,
            k,
            about.q_weight,
            about.k_weight,
            cos_sin,
            about.positions,
            about.eps,
            s.num_heads,
            s.num_kv_heads,
            s.head_dim,
            s.rotary_dim,
            norm_beta=1.0,
        )
        k, v = (part.view(-1, s.num_kv_heads, s.head_dim) for part in (k, v))
        write(k, v, one.keys, one.values, about.slots, "auto", scale, scale)
        out: Tensor = q
        return out

    return [Prepared([partial(run, one) for one in work.inputs])]


def _dense(work: Work, product: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[Prepared]:
    def run(one: DenseInputs) -> Tensor:
        if one.scale_inv is None:
            return functional.linear(one.x, one.weight)
        return product(one.x, one.weight, one.scale_inv)

    return [Prepared([partial(run, one) for one in work.inputs])]


def dense(work: Work) -> list[Prepared]:
    """FlashInfer's block-scaled product below 32 rows, DeepGEMM's from there: vLLM's first choice on Hopper."""
    if work.case.tokens >= 32:
        return dense_deepgemm(work)
    kernel = named("vllm.utils.flashinfer:flashinfer_fp8_blockscale_gemm") if work.inputs[0].quantised else None

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        assert kernel is not None
        out: Tensor = kernel(input=x, weight=weight, weight_scale=scale, out_dtype=torch.bfloat16)
        return out

    return _dense(work, product)


def dense_deepgemm(work: Work) -> list[Prepared]:
    """DeepGEMM, activations rounded by vLLM's kernel before."""
    if not work.inputs[0].quantised:
        raise ValueError("the router is not quantised")
    round_tokens, kernel = named(f"{_FP8}:per_token_group_quant_fp8"), named("vllm.utils.deep_gemm:fp8_gemm_nt")

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        codes, factors = round_tokens(x, _BLOCK, column_major_scales=True, tma_aligned_scales=True, use_ue8m0=False)
        out = x.new_empty(x.shape[0], weight.shape[0])
        kernel((codes, factors), (weight, scale), out, is_deep_gemm_e8m0_used=False)
        return out

    return _dense(work, product)


def dense_cutlass(work: Work) -> list[Prepared]:
    """CUTLASS, activations rounded by vLLM's kernel before."""
    if not work.inputs[0].quantised:
        raise ValueError("the router is not quantised")
    round_tokens, kernel = named(f"{_FP8}:per_token_group_quant_fp8"), named("vllm._custom_ops:cutlass_scaled_mm")

    def product(x: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
        codes, factors = round_tokens(x, _BLOCK, column_major_scales=True, use_ue8m0=False)
        out: Tensor = kernel(codes, weight.T, out_dtype=x.dtype, scale_a=factors, scale_b=scale.T)
        return out

    return _dense(work, product)
