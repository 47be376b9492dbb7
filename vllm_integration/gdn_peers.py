"""The prefill functions of Gated DeltaNet that vLLM brings, offered to our kernels' choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from vllm.config import VllmConfig

from qwen3next_plugin.gdn_peers import offer_flashinfer, try_prefills
from qwen3next_plugin.kernels.gdn.peers import OFFERS, Peer, PeerCall

from .spec import spec_of


def fla_peer(chunk_gated_delta_rule: Callable[..., Any]) -> Peer:
    """vLLM's copy of flash-linear-attention's function: log decay, states [V, K], tables of chunks from outside."""

    def run(call: PeerCall) -> tuple[Tensor, Tensor | None]:
        with torch.no_grad():
            _, final = chunk_gated_delta_rule(
                q=call.q[None],
                k=call.k[None],
                v=call.v[None],
                g=call.decay[None],
                beta=call.beta[None],
                initial_state=call.state,
                output_final_state=True,
                cu_seqlens=call.rows.cu_seqlens,
                chunk_indices=call.rows.chunk_indices,
                chunk_offsets=call.rows.chunk_offsets,
                use_qk_l2norm_in_kernel=False,
                core_attn_out=call.out.view(-1),
            )
        return final, None

    return Peer("fla", run, log_decay=True)


def _fla() -> Peer:
    from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

    return fla_peer(chunk_gated_delta_rule)


def offer_prefills() -> None:
    """Offers what is installed."""
    OFFERS.look_for("fla", _fla, "not in this vLLM")
    offer_flashinfer()


def offer_engine_prefills(vllm_config: VllmConfig) -> None:
    """Offers what is installed and tries it for this rank's heads, on a GPU.

    Raises SettingsError if QWEN3NEXT_GDN_PREFILL names what is not there.
    """
    offer_prefills()
    ranks = vllm_config.parallel_config.tensor_parallel_size
    try_prefills(spec_of(vllm_config).gdn, ranks, vllm_config.model_config.dtype)
