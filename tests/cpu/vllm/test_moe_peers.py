"""vLLM's DeepGEMM is called as it wants to be called, by vLLM's own wrappers."""

from types import SimpleNamespace

import pytest
import torch
from vllm.utils import deep_gemm

from qwen3next_plugin.kernels.moe import peer_trial
from qwen3next_plugin.vllm_integration.moe_peers import load_deepgemm
from tests.kernels.moe_peer_case import FakeDeepGemm, check_installed, check_peer


def test_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDeepGemm()
    module = SimpleNamespace(set_mk_alignment_for_contiguous_layout=lambda value: setattr(fake, "alignment", value))
    monkeypatch.setattr(peer_trial, "TOKENS", 12)
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_supported", lambda: True)
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_e8m0_used", lambda: False)
    monkeypatch.setattr(deep_gemm, "_lazy_init", lambda: None)
    monkeypatch.setattr(deep_gemm, "_import_deep_gemm", lambda: module)
    monkeypatch.setattr(deep_gemm, "_grouped_impl", fake)
    monkeypatch.setattr(deep_gemm, "_get_mk_alignment_for_contiguous_layout_impl", lambda: fake.alignment)
    check_peer(load_deepgemm())
    assert fake.rows and fake.alignment == 128, "the engine's own alignment is back"


def test_where_vllm_would_not_use_it_nor_do_we(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deep_gemm, "is_deep_gemm_supported", lambda: False)
    with pytest.raises(RuntimeError, match="VLLM_USE_DEEP_GEMM is 0"):
        load_deepgemm()


@pytest.mark.gpu
def test_what_is_installed_agrees_with_our_own_kernels() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    check_installed(load_deepgemm())
