"""The grouped product that SGLang brings, offered for the experts of prefills."""

from __future__ import annotations

from importlib import import_module

import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.runtime_context import get_exec
from transformers import PretrainedConfig

from qwen3next_plugin.kernels.moe.peer_deepgemm import NAME, deepgemm_peer
from qwen3next_plugin.kernels.moe.peers import OFFERS, Peer
from qwen3next_plugin.moe_peers import try_grouped_products

from .moe import parallel_layers
from .spec import spec_of


def load_deepgemm() -> Peer:
    """DeepGEMM as SGLang requires it. Raises RuntimeError where SGLang would not use it."""
    from sglang.srt.layers import deep_gemm_wrapper

    if not deep_gemm_wrapper.ENABLE_JIT_DEEPGEMM:
        raise RuntimeError("it is not installed, not for this GPU, or SGLANG_ENABLE_JIT_DEEPGEMM is 0")
    # Not through SGLang's wrapper of the product, which compiles for every number of rows up to thousands.
    product = import_module("deep_gemm").m_grouped_fp8_gemm_nt_contiguous
    return deepgemm_peer(product, deep_gemm_wrapper.contiguous_layout_alignment_scope)


def offer_engine_products(config: PretrainedConfig, quant_config: QuantizationConfig | None) -> None:
    """Offers what is installed and tries it for this rank's experts, on a GPU.

    Raises SettingsError if QWEN3NEXT_MOE_PREFILL names what is not there.
    """
    if get_exec().deterministic.enable_deterministic_inference:
        OFFERS.say_missing(NAME, "the size of the batch would decide, and --enable-deterministic-inference is set")
    else:
        OFFERS.look_for(NAME, load_deepgemm, "not in this SGLang")
    spec = spec_of(config)
    try_grouped_products(spec, parallel_layers(spec, quant_config), torch.get_default_dtype())
