"""The prefill functions of Gated DeltaNet that SGLang brings, offered to our kernels' choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.runtime_context import get_exec, mamba_cache_chunk_size
from torch import Tensor
from transformers import PretrainedConfig

from qwen3next_plugin.gdn_peers import offer_flashinfer, try_prefills
from qwen3next_plugin.kernels.gdn.peers import OFFERS, Peer, PeerCall

from .names import get_parallel
from .spec import spec_of


def fla_peer(chunk_gated_delta_rule: Callable[..., Any]) -> Peer:
    """SGLang's copy of flash-linear-attention's function: log decay, states [V, K] by index, written back in place."""

    def run(call: PeerCall) -> tuple[Tensor, Tensor | None]:
        rows = torch.arange(call.state.shape[0], dtype=torch.int32, device=call.state.device)
        with torch.no_grad():
            out, *_ = chunk_gated_delta_rule(
                q=call.q[None],
                k=call.k[None],
                v=call.v[None],
                g=call.decay[None],
                beta=call.beta[None],
                initial_state=call.state,
                initial_state_indices=rows,
                cu_seqlens=call.rows.cu_seqlens,
                use_qk_l2norm_in_kernel=False,
                inplace_update=True,
            )
        call.out.copy_(out[0])
        return call.state, None

    return Peer("fla", run, log_decay=True)


def snapshot_grid() -> int | None:
    """After a multiple of how many tokens of a row the radix tree may want a state; None if it never does."""
    return mamba_cache_chunk_size() if get_exec().mamba.enable_mamba_extra_buffer else None


def _fla() -> Peer:
    from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule

    return fla_peer(chunk_gated_delta_rule)


def offer_prefills(deterministic: bool = False) -> None:
    """Offers what is installed; deterministic: but for what sums in an order that depends on the batch."""
    OFFERS.look_for("fla", _fla, "not in this SGLang")
    if deterministic:
        OFFERS.say_missing("flashinfer", "its sums depend on the batch, and --enable-deterministic-inference is set")
    else:
        offer_flashinfer()


def offer_engine_prefills(config: PretrainedConfig) -> None:
    """Offers what is installed and tries it for this rank's heads, on a GPU.

    Raises SettingsError if QWEN3NEXT_GDN_PREFILL names what is not there.
    """
    offer_prefills(get_exec().deterministic.enable_deterministic_inference)
    try_prefills(spec_of(config).gdn, get_parallel().tp_size, torch.get_default_dtype(), snapshot_grid())
