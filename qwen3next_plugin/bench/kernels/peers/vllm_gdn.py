"""vLLM's Gated DeltaNet between its projections, as its stock layer runs it for this model (0.32)."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ..gdn_work import GdnAbout, GdnInputs
from ..work import Prepared, Work
from . import named
from .common import compiled, flashinfer_decode, gated_norm, heads_of, split_interleaved

_OPS = "vllm.third_party.flash_linear_attention.ops"
_CONV = "vllm.model_executor.layers.mamba.ops.causal_conv1d"

Core = Callable[[GdnInputs, Tensor, Tensor, Tensor, Tensor], Tensor]
"""From a copy, mixed_qkv, z, a and b to the core's output [T, HV, V], normed already if `normed` says so."""


def _works(work: Work, core: Core, normed: bool = False, **facts: Any) -> list[Prepared]:
    """Split, ``core`` and gated norm, the norm once as the compiler fuses it and once as vLLM's kernel."""
    about: GdnAbout = work.about
    p, splits = about.parameters, {"compiled": compiled(split_interleaved), "eager": split_interleaved}
    kernel = named(f"{_OPS}.layernorm_guard:rmsnorm_fn")

    def by_kernel(x: Tensor, z: Tensor) -> Tensor:
        out: Tensor = kernel(x, p.norm_weight, None, z=z, eps=p.norm_eps, group_size=None, norm_before_gate=True)
        return out

    fused = compiled(gated_norm)
    norms: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
        "compiled": lambda x, z: fused(x, z, p.norm_weight, p.norm_eps),
        "kernel": by_kernel,
        "in the kernel": lambda x, z: x,
    }
    ways = [("compiled", "compiled"), ("compiled", "kernel"), ("eager", "kernel")]  # the last where nothing compiles
    if normed:
        ways = [("compiled", "in the kernel"), ("eager", "in the kernel")]

    def run(one: GdnInputs, qkvz: Tensor, ba: Tensor, split: str, norm: str) -> Tensor:
        mixed, z, b, a = splits[split](qkvz, ba, about.sizes)
        return norms[norm](core(one, mixed, z, a, b), z)

    laid = [about.interleaved(one) for one in work.inputs]
    return [
        Prepared(
            [partial(run, one, *pair, split, norm) for one, pair in zip(work.inputs, laid, strict=True)],
            facts={"split": split, "norm": norm, "launches": "split, convolution, delta rule, norm", **facts},
        )
        for split, norm in ways
    ]


def _update(about: GdnAbout, one: GdnInputs, mixed: Tensor, **drafts: Any) -> Tensor:
    slots = about.slots[:, 0]
    weight = about.parameters.conv_weight
    out: Tensor = named(f"{_CONV}:causal_conv1d_update")(
        mixed, one.conv_state, weight, None, "silu", conv_state_indices=slots, validate_data=False, **drafts
    )
    return out


def decode(work: Work) -> list[Prepared]:
    """The packed decode that takes the convolution's output as it is."""
    about: GdnAbout = work.about
    kernel = named(f"{_OPS}:fused_recurrent_gated_delta_rule_packed_decode")
    p, slots = about.parameters, about.slots[:, 0].contiguous()

    def core(one: GdnInputs, mixed: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros_like(one.out)
        kernel(
            mixed_qkv=_update(about, one, mixed),
            a=a,
            b=b,
            A_log=p.A_log,
            dt_bias=p.dt_bias,
            scale=about.sizes.head_k_dim**-0.5,
            initial_state=one.ssm_state,
            out=out.unsqueeze(1),
            ssm_state_indices=slots,
            use_qk_l2norm_in_kernel=True,
        )
        return out

    return _works(work, core)


def decode_flashinfer(work: Work) -> list[Prepared]:
    """The same with FlashInfer's decode kernel in the middle."""
    about: GdnAbout = work.about
    slots = about.slots[:, 0].contiguous()

    def core(one: GdnInputs, mixed: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return flashinfer_decode(_update(about, one, mixed), a, b, about, one.ssm_state, slots)

    return _works(work, core)


def _drafts(about: GdnAbout) -> dict[str, Any]:
    accepted = torch.ones(about.rows, dtype=torch.int32, device=about.slots.device)
    return {"num_accepted_tokens": accepted, "query_start_loc": about.starts, "max_query_len": about.tokens}


def verify(work: Work) -> list[Prepared]:
    """The recurrent kernel that keeps the state after every draft in a slot of its own: there is nothing to commit."""
    about: GdnAbout = work.about
    kernel = named(f"{_OPS}:fused_sigmoid_gating_delta_rule_update")
    p, drafts = about.parameters, _drafts(about)

    def core(one: GdnInputs, mixed: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q, k, v = heads_of(_update(about, one, mixed, **drafts), about)
        flat = torch.cat([part.reshape(-1) for part in (q, k, v)])
        parts = flat.split([part.numel() for part in (q, k, v)])
        q, k, v = (one_part.view(1, *part.shape) for one_part, part in zip(parts, (q, k, v), strict=True))
        found, _ = kernel(
            A_log=p.A_log,
            a=a,
            b=b,
            dt_bias=p.dt_bias,
            q=q,
            k=k,
            v=v,
            initial_state=one.ssm_state,
            inplace_final_state=True,
            cu_seqlens=about.starts,
            ssm_state_indices=about.slots,
            num_accepted_tokens=drafts["num_accepted_tokens"],
            use_qk_l2norm_in_kernel=True,
        )
        return torch.zeros_like(one.out).copy_(found.squeeze(0))

    return _works(work, core)


def verify_cuda(work: Work) -> list[Prepared]:
    """vLLM's CUDA kernel for drafts, which its layer keeps from this model's order of weights."""
    about: GdnAbout = work.about
    kernel = named("vllm._custom_ops:fused_gdn_decode_post_conv_mtp")
    p, drafts = about.parameters, _drafts(about)

    def core(one: GdnInputs, mixed: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out = torch.zeros_like(one.out)
        kernel(
            mixed_qkv=_update(about, one, mixed, **drafts),
            a=a,
            b=b,
            A_log=p.A_log,
            dt_bias=p.dt_bias,
            state_indices=about.slots,
            cu_seqlens=about.starts,
            num_accepted_tokens=drafts["num_accepted_tokens"],
            state=one.ssm_state,
            output_gate=z,
            norm_weight=p.norm_weight,
            out=out,
            scale=about.sizes.head_k_dim**-0.5,
            norm_eps=p.norm_eps,
            output_gate_activation="silu",
        )
        return out

    return _works(work, core, normed=True, note="stock vLLM does not run it for this model's order of weights")


def _conv_metadata(about: GdnAbout) -> SimpleNamespace:
    build = named("vllm.v1.attention.backends.utils:compute_causal_conv1d_metadata")
    names = ("nums_dict", "batch_ptr", "token_chunk_offset_ptr")
    found = build(about.starts.cpu(), device=about.starts.device)
    return SimpleNamespace(**dict(zip(names, found, strict=True)))


def _convolve(about: GdnAbout) -> Callable[[GdnInputs, Tensor], Tensor]:
    kernel, metadata, rows = named(f"{_CONV}:causal_conv1d_fn"), _conv_metadata(about), about.prefill_rows()

    def run(one: GdnInputs, mixed: Tensor) -> Tensor:
        out: Tensor = kernel(
            mixed.transpose(0, 1),
            about.parameters.conv_weight,
            None,
            activation="silu",
            conv_states=one.conv_state,
            has_initial_state=rows.has_initial_state,
            cache_indices=rows.state_slots,
            query_start_loc=about.starts,
            metadata=metadata,
        )
        return out.transpose(0, 1)

    return run


def convolution(work: Work) -> list[Prepared]:
    """The convolution alone, of an input that was split already."""
    about: GdnAbout = work.about
    run = _convolve(about)
    mixed = [one.qkvz[:, : about.sizes.conv_dim].contiguous() for one in work.inputs]
    return [Prepared([partial(run, one, x) for one, x in zip(work.inputs, mixed, strict=True)])]


def prefill(work: Work) -> list[Prepared]:
    """With FlashInfer's chunked kernel, which vLLM picks on Hopper."""
    kernel = named("vllm.model_executor.layers.mamba.gdn.qwen_gdn_linear_attn:fi_chunk_gated_delta_rule")
    return _prefill(work, kernel, {})


def prefill_triton(work: Work) -> list[Prepared]:
    """With the kernels that vLLM took from flash-linear-attention (--gdn-prefill-backend triton)."""
    about: GdnAbout = work.about
    chunk = named(f"{_OPS}.utils:FLA_CHUNK_SIZE")
    starts, device = about.starts.cpu(), about.starts.device
    indices, offsets = (named(f"{_OPS}.index:prepare_chunk_{name}")(starts, chunk) for name in ("indices", "offsets"))
    chunks = {"chunk_indices": indices.to(device), "chunk_offsets": offsets.to(device)}
    return _prefill(work, named(f"{_OPS}:chunk_gated_delta_rule"), chunks)


def _prefill(work: Work, kernel: Callable[..., Any], chunks: dict[str, Tensor]) -> list[Prepared]:
    about: GdnAbout = work.about
    prepare, convolve = named(f"{_OPS}:fused_post_conv_prep"), _convolve(about)
    g, p, rows = about.sizes, about.parameters, about.prefill_rows()
    slots = rows.state_slots.long()

    def core(one: GdnInputs, mixed: Tensor, z: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q, k, v, decay, beta = prepare(
            conv_output=convolve(one, mixed),
            a=a,
            b=b,
            A_log=p.A_log,
            dt_bias=p.dt_bias,
            num_k_heads=g.num_k_heads,
            head_k_dim=g.head_k_dim,
            head_v_dim=g.head_v_dim,
            apply_l2norm=True,
            output_g_exp=False,
        )
        initial = one.ssm_state[slots]
        initial[~rows.has_initial_state, ...] = 0
        found, final = kernel(
            q=q[None],
            k=k[None],
            v=v[None],
            g=decay[None],
            beta=beta[None],
            initial_state=initial,
            output_final_state=True,
            cu_seqlens=about.starts,
            use_qk_l2norm_in_kernel=False,
            **chunks,
        )
        one.ssm_state[slots] = final.to(one.ssm_state.dtype)
        return torch.zeros_like(one.out).copy_(found.squeeze(0))

    return _works(work, core)
