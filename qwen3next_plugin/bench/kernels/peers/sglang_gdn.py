"""SGLang's Gated DeltaNet between its projections, as its stock backend runs it for this model (0.5.20)."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..gdn_work import GdnAbout, GdnInputs
from ..work import Prepared, Work
from . import named
from .sglang_context import publish

_FLA = "sglang.kernels.ops.attention.fla"
_CONV = "sglang.kernels.ops.mamba.causal_conv1d_triton"
_PROJ = "sglang.kernels.ops.attention.triton_gdn_fused_proj"
_SCATTER = "sglang.kernels.ops.mamba.mamba_state_scatter_triton"
_KERNELS = "sglang.srt.layers.attention.linear.kernels"
_FUSED_SPLIT = 8192  # columns up to which SGLang takes q, k and v apart in a kernel of its own

Core = Callable[[GdnInputs, Tensor, Tensor, Tensor], Tensor]
"""From a copy, mixed_qkv, a and b to the core's output [.., HV, V]."""


def _works(work: Work, core: Core, **facts: Any) -> list[Prepared]:
    about: GdnAbout = work.about
    g, p = about.sizes, about.parameters
    split, norm = named(f"{_PROJ}:fused_qkvzba_split_reshape_cat"), named(f"{_FLA}.fused_norm_gate:rms_norm_gated")

    def run(one: GdnInputs, qkvz: Tensor, ba: Tensor) -> Tensor:
        mixed, z, b, a = split(qkvz, ba, g.num_k_heads, g.num_v_heads, g.head_k_dim, g.head_v_dim)
        flat = core(one, mixed, a, b).reshape(-1, g.head_v_dim)
        gate = z.reshape(-1, g.head_v_dim)
        out: Tensor = norm(flat, gate, p.norm_weight, None, "silu", residual=None, eps=p.norm_eps)
        return out

    laid = [about.interleaved(one) for one in work.inputs]
    calls = [partial(run, one, *pair) for one, pair in zip(work.inputs, laid, strict=True)]
    return [Prepared(calls, facts={"launches": "split, convolution, delta rule, norm", **facts})]


def _update(about: GdnAbout, one: GdnInputs, mixed: Tensor) -> Tensor:
    weight, slots = about.parameters.conv_weight, about.slots[:, 0].contiguous()
    out: Tensor = named(f"{_CONV}:causal_conv1d_update")(
        mixed, one.conv_state, weight, None, "silu", conv_state_indices=slots
    )
    return out


def _kernel(name: str) -> Any:
    """SGLang's class around Triton's or FlashInfer's kernels."""
    publish()
    module, of = {"triton": ("gdn_triton", "TritonGDNKernel"), "flashinfer": ("gdn_flashinfer", "FlashInferGDNKernel")}[
        name
    ]
    return named(f"{_KERNELS}.{module}:{of}")()


def decode(work: Work) -> list[Prepared]:
    """The packed decode that takes the convolution's output as it is."""
    about: GdnAbout = work.about
    kernel, p, g = _kernel("triton"), about.parameters, about.sizes
    slots = about.slots[:, 0].contiguous()

    def core(one: GdnInputs, mixed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        out: Tensor = kernel.packed_decode(
            _update(about, one, mixed),
            a,
            b,
            A_log=p.A_log,
            dt_bias=p.dt_bias,
            scale=g.head_k_dim**-0.5,
            ssm_states=one.ssm_state,
            cache_indices=slots,
            num_v_heads=g.num_v_heads,
            head_v_dim=g.head_v_dim,
        )
        return out

    return _works(work, core)


def decode_flashinfer(work: Work) -> list[Prepared]:
    """With FlashInfer's kernel (--linear-attn-decode-backend flashinfer), which gathers and scatters states here."""
    about: GdnAbout = work.about
    kernel, p = _kernel("flashinfer"), about.parameters
    slots = about.slots[:, 0].contiguous()

    def core(one: GdnInputs, mixed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q, k, v = _heads(about, _update(about, one, mixed))
        states = {"ssm_states": one.ssm_state, "cache_indices": slots, "query_start_loc": about.starts}
        out: Tensor = kernel.decode(q, k, v, a, b, A_log=p.A_log, dt_bias=p.dt_bias, **states)
        return out

    return _works(work, core)


def _heads(about: GdnAbout, mixed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v [1, T, heads, dim]: by SGLang's kernel where it has one for so many columns, else views."""
    g = about.sizes
    if mixed.shape[1] <= _FUSED_SPLIT:
        split = named(f"{_PROJ}:fused_qkv_split_gdn_prefill")
        q, k, v = split(mixed, g.num_k_heads, g.num_k_heads, g.num_v_heads, g.head_k_dim, g.head_k_dim, g.head_v_dim)
    else:
        q, k, v = mixed.split([g.key_dim, g.key_dim, g.value_dim], dim=-1)
    keys = (1, mixed.shape[0], g.num_k_heads, g.head_k_dim)
    return q.view(keys), k.view(keys), v.view(1, mixed.shape[0], g.num_v_heads, g.head_v_dim)


def _verify(work: Work, kernel: Any) -> list[Prepared]:
    """Verification keeps states beside the pool; the accepted one is copied back when the engine commits."""
    work.restore()  # the pools below are copies of what stands in the inputs now
    about: GdnAbout = work.about
    g, p, first = about.sizes, about.parameters, work.inputs[0]
    update, slots = named(f"{_CONV}:causal_conv1d_update"), about.slots[:, 0].contiguous()
    keep, keep_windows = (
        named(f"{_SCATTER}:fused_{name}_scatter_with_mask") for name in ("mamba_state", "conv_window")
    )
    width = g.conv_kernel_size - 1
    states = first.ssm_state.new_zeros(about.rows, about.tokens, *first.ssm_state.shape[1:])
    shared = first.conv_state.new_zeros(about.rows, g.conv_dim, about.tokens + width - 1)
    windows = shared.as_strided(  # as SGLang keeps them: the windows of successive drafts overlap
        (about.rows, about.tokens, g.conv_dim, width), (shared.stride(0), 1, shared.stride(1), 1)
    )
    order = torch.arange(about.rows, dtype=torch.int32, device=slots.device)
    pools = [one.conv_state[..., :width].contiguous() for one in work.inputs]
    convs = {id(one): pool for one, pool in zip(work.inputs, pools, strict=True)}

    def core(one: GdnInputs, mixed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        pool = convs[id(one)]
        x = mixed.view(about.rows, about.tokens, -1).transpose(1, 2)
        convolved = update(
            x,
            pool,
            p.conv_weight,
            None,
            "silu",
            conv_state_indices=slots,
            intermediate_conv_window=windows,
            intermediate_state_indices=order,
        )
        q, k, v = _heads(about, convolved.transpose(1, 2).reshape(mixed.shape[0], -1))
        out: Tensor = kernel.target_verify(
            A_log=p.A_log,
            dt_bias=p.dt_bias,
            q=q,
            k=k,
            v=v,
            a=a,
            b=b,
            ssm_states=one.ssm_state,
            cache_indices=slots,
            query_start_loc=about.starts,
            intermediate_states_buffer=states,
            intermediate_state_indices=order,
            cache_steps=about.tokens,
            retrieve_parent_token=None,
        )
        keep(one.ssm_state[None], states[None], slots, about.last)
        keep_windows(pool[None], windows[None], slots, about.last)
        return out

    return _works(work, core, commit="two scatters of one layer; SGLang does all layers in two launches")


def verify(work: Work) -> list[Prepared]:
    """The recurrent kernel of its default backend."""
    return _verify(work, _kernel("triton"))


def verify_flashinfer(work: Work) -> list[Prepared]:
    """FlashInfer's kernel for drafts, which SGLang takes with FlashInfer as prefill or decode backend."""
    return _verify(work, _kernel("flashinfer"))


def _convolve(about: GdnAbout) -> Callable[[GdnInputs, Tensor], Tensor]:
    kernel, rows = named("sglang.srt.layers.attention.mamba.causal_conv1d:causal_conv1d_fn"), about.prefill_rows()
    lengths = [about.tokens] * about.rows

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
            seq_lens_cpu=lengths,
        )
        return out.transpose(0, 1)[: mixed.shape[0]]

    return run


def convolution(work: Work) -> list[Prepared]:
    """The convolution alone, of an input that was split already."""
    about: GdnAbout = work.about
    run = _convolve(about)
    mixed = [one.qkvz[:, : about.sizes.conv_dim].contiguous() for one in work.inputs]
    return [Prepared([partial(run, one, x) for one, x in zip(work.inputs, mixed, strict=True)])]


def prefill(work: Work) -> list[Prepared]:
    """FlashInfer's chunked kernel where SGLang picks it on Hopper, up to 32,768 tokens at once; else Triton's."""
    return prefill_triton(work) if work.about.tokens * work.about.rows > 32768 else _prefill(work, "flashinfer")


def prefill_triton(work: Work) -> list[Prepared]:
    """The kernels that SGLang took from flash-linear-attention (--linear-attn-prefill-backend triton)."""
    return _prefill(work, "triton")


def _prefill(work: Work, backend: str) -> list[Prepared]:
    about: GdnAbout = work.about
    kernel, gating, convolve = _kernel(backend), named(f"{_FLA}.fused_gdn_gating:fused_gdn_gating"), _convolve(about)
    p, rows = about.parameters, about.prefill_rows()

    def core(one: GdnInputs, mixed: Tensor, a: Tensor, b: Tensor) -> Tensor:
        q, k, v = _heads(about, convolve(one, mixed))
        decay, beta = gating(p.A_log, a, b, p.dt_bias)
        out: Tensor = kernel.extend(
            q,
            k,
            v,
            decay,
            beta,
            ssm_states=one.ssm_state,
            cache_indices=rows.state_slots.contiguous(),
            query_start_loc=about.starts,
        )[0]
        return out

    return _works(work, core, backend=backend)
