"""SGLang's own prefill functions are called as they want to be called."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.kernels.ops.attention.fla.chunk import chunk_gated_delta_rule
from torch import Tensor

from qwen3next_plugin.bench.kernels.peers import sglang_context
from qwen3next_plugin.kernels.gdn import peers
from qwen3next_plugin.kernels.gdn.peer_flashinfer import flashinfer_peer
from qwen3next_plugin.sglang_integration.gdn_metadata import prefill_rows
from qwen3next_plugin.sglang_integration.gdn_peers import fla_peer
from qwen3next_plugin.tune.gdn import engines
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
    ) -> tuple[Tensor, None, Tensor]:
        """As in SGLang's copy: a batch of one, log decay, states [S, HV, V, K] by index, overwritten."""
        assert others["inplace_update"] and not others["use_qk_l2norm_in_kernel"] and not torch.is_grad_enabled()
        slots = others["initial_state_indices"].long()
        out = torch.empty_like(v)
        final = delta_rule_rows(q[0], k[0], v[0], g[0], beta[0], initial_state[slots], cu_seqlens, out[0])
        initial_state[slots] = final
        return out, None, initial_state

    check_adapter(fla_peer, fake, chunk_gated_delta_rule)


def test_a_tuning_gets_what_sglang_has_without_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """With default settings published, which are another test's here."""
    published: list[None] = []
    monkeypatch.setattr(sglang_context, "publish", lambda: published.append(None))
    with empty_registry():
        engines.offer("sglang")
        assert "fla" in peers.OFFERS.found and {*peers.OFFERS.found, *peers.OFFERS.missing} == {"fla", "flashinfer"}
    assert published and "sglang" in engines.engine_versions("sglang")


@pytest.mark.parametrize(
    ("lengths", "tokens", "packed"),
    [
        ([3, 4], 7, True),
        ([3, 4], 9, True),  # padded at the end
        ([3, 4], 6, False),  # a row that fills up the batch has a length and no tokens
        ([3, 4, 1], 8, False),  # lengths of rows that the slots know nothing of
        (None, 7, False),
    ],
)
def test_rows_are_packed_if_the_host_knows_where_they_lie(lengths: list[int] | None, tokens: int, packed: bool) -> None:
    batch = SimpleNamespace(
        input_ids=torch.zeros(tokens),
        extend_seq_lens_cpu=lengths,
        extend_start_loc=torch.tensor([0, 3]),
        extend_seq_lens=torch.tensor([3, 4]),
        extend_prefix_lens=torch.tensor([0, 64]),
    )
    rows = prefill_rows(batch, torch.tensor([2, 5]), None, 128)
    # whatever type SGLang's buffers have, lest a captured prefill's compile kernels of their own
    assert rows.query_start.dtype == rows.query_end.dtype == torch.int32
    assert rows.query_end.tolist() == [3, 7]
    if not packed:
        assert rows.packed is None
        return
    assert rows.packed is not None and rows.packed.cu_seqlens.tolist() == [0, 3, 7]
    assert rows.packed.first == 0 and rows.packed.snapshot_grid == 128


@pytest.mark.gpu
def test_what_is_installed_agrees_with_our_own_kernels() -> None:
    check_installed(fla_peer(chunk_gated_delta_rule))
    flashinfer = pytest.importorskip("flashinfer.gdn_prefill")
    for grid in (None, 64, 128):
        check_installed(flashinfer_peer(flashinfer.chunk_gated_delta_rule), grid)
