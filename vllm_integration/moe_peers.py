"""The grouped product that vLLM brings, offered for the experts of prefills."""

from __future__ import annotations

from vllm.config import VllmConfig

from qwen3next_plugin.kernels.moe.peer_deepgemm import NAME, deepgemm_peer
from qwen3next_plugin.kernels.moe.peers import OFFERS, Peer
from qwen3next_plugin.moe_peers import try_grouped_products

from .moe import parallel_layers
from .spec import spec_of


def load_deepgemm() -> Peer:
    """DeepGEMM as vLLM finds it: installed, or its own copy. Raises RuntimeError where vLLM would not use it."""
    from vllm.utils import deep_gemm

    if not deep_gemm.is_deep_gemm_supported():
        raise RuntimeError("it is not installed, not for this GPU, or VLLM_USE_DEEP_GEMM is 0")
    return deepgemm_peer(deep_gemm.m_grouped_fp8_gemm_nt_contiguous, deep_gemm.mk_alignment_scope)


def offer_engine_products(vllm_config: VllmConfig) -> None:
    """Offers what is installed and tries it for this rank's experts, on a GPU.

    Raises SettingsError if QWEN3NEXT_MOE_PREFILL names what is not there.
    """
    OFFERS.look_for(NAME, load_deepgemm, "not in this vLLM")
    spec = spec_of(vllm_config)
    try_grouped_products(spec, parallel_layers(spec, vllm_config), vllm_config.model_config.dtype)
