"""vLLM's own prefill functions are called as they want to be called."""

from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.third_party.flash_linear_attention.ops import chunk_gated_delta_rule

from qwen3next_plugin.kernels.gdn import peers
from qwen3next_plugin.kernels.gdn.peer_flashinfer import flashinfer_peer
from qwen3next_plugin.tune.gdn import engines
from qwen3next_plugin.vllm_integration.gdn_peers import fla_peer
from tests.kernels.peer_case import check_adapter, check_installed, delta_rule_rows, empty_registry


def test_flash_linear_attention() -> None:
    def fake(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        initial_state: Tensor,
        cu_seqlens: Tensor,
        **others: Any,
    ) -> tuple[Tensor, Tensor]:
        """As in vLLM's copy: a batch of one, log decay, the output goes to a flat buffer, states [N, HV, V, K]."""
        assert others["output_final_state"] and not others["use_qk_l2norm_in_kernel"] and not torch.is_grad_enabled()
        chunks = [-(-length // 64) for length in cu_seqlens.diff().tolist()]
        assert others["chunk_offsets"].diff().tolist() == chunks and len(others["chunk_indices"]) == sum(chunks)
        out = others["core_attn_out"][: v.numel()].view(*v.shape)
        final = delta_rule_rows(q[0], k[0], v[0], g[0], beta[0], initial_state, cu_seqlens, out[0])
        return out, final

    check_adapter(fla_peer, fake, chunk_gated_delta_rule)


def test_a_tuning_gets_what_vllm_has_without_a_server() -> None:
    with empty_registry():
        engines.offer("vllm")
        assert "fla" in peers.OFFERS.found and {*peers.OFFERS.found, *peers.OFFERS.missing} == {"fla", "flashinfer"}
    assert "vllm" in engines.engine_versions("vllm")


@pytest.mark.gpu
def test_what_is_installed_agrees_with_our_own_kernels() -> None:
    check_installed(fla_peer(chunk_gated_delta_rule))
    flashinfer = pytest.importorskip("flashinfer.gdn_prefill")
    for grid in (None, 64, 128):
        check_installed(flashinfer_peer(flashinfer.chunk_gated_delta_rule), grid)
