"""SGLang's DeepGEMM is called as it wants to be called, in SGLang's scope for the height of its tiles."""

import sys
from types import SimpleNamespace

import pytest
import torch
from sglang.srt.layers import deep_gemm_wrapper

from qwen3next_plugin.kernels.moe import peer_trial
from qwen3next_plugin.sglang_integration.moe_peers import load_deepgemm
from tests.kernels.moe_peer_case import FakeDeepGemm, check_installed, check_peer


def test_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = FakeDeepGemm()
    module = SimpleNamespace(
        m_grouped_fp8_gemm_nt_contiguous=fake,
        get_mk_alignment_for_contiguous_layout=lambda: fake.alignment,
        set_mk_alignment_for_contiguous_layout=lambda value: setattr(fake, "alignment", value),
    )
    monkeypatch.setattr(peer_trial, "TOKENS", 12)
    monkeypatch.setitem(sys.modules, "deep_gemm", module)
    monkeypatch.setattr(deep_gemm_wrapper.entrypoint, "deep_gemm", module, raising=False)
    monkeypatch.setattr(deep_gemm_wrapper, "ENABLE_JIT_DEEPGEMM", True)
    check_peer(load_deepgemm())
    assert fake.rows and fake.alignment == 128, "the engine's own alignment is back"


def test_where_sglang_would_not_use_it_nor_do_we() -> None:
    with pytest.raises(RuntimeError, match="SGLANG_ENABLE_JIT_DEEPGEMM is 0"):
        load_deepgemm()


@pytest.mark.gpu
def test_what_is_installed_agrees_with_our_own_kernels() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs a Hopper GPU")
    check_installed(load_deepgemm())
