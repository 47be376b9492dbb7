"""The Gated DeltaNet layer inside vLLM: what its opaque op fills, with and without a cache."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels.gdn.step import GdnParameters, RecurrentRows, gdn_step
from qwen3next_plugin.vllm_integration import gdn_layer
from qwen3next_plugin.vllm_integration.gdn_layer import Qwen3NextGdnLayer
from qwen3next_plugin.vllm_integration.gdn_metadata import Qwen3NextGdnMetadata
from tests.helpers import nan_like

K_HEADS, V_HEADS, KEY_DIM, VALUE_DIM, WIDTH, TOKENS = 1, 2, 8, 4, 4, 3
CONV_DIM = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM


def run(monkeypatch: pytest.MonkeyPatch, layer: Any, metadata: Any, qkvz: torch.Tensor, ba: torch.Tensor) -> Any:
    """`run_core` over poison, in a forward context with this metadata."""
    monkeypatch.setattr(gdn_layer, "get_forward_context", lambda: SimpleNamespace(attn_metadata=metadata))
    out = nan_like(TOKENS, V_HEADS, VALUE_DIM)
    Qwen3NextGdnLayer.run_core(layer, qkvz, ba, out)
    return out


def make_inputs() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(TOKENS, CONV_DIM + V_HEADS * VALUE_DIM), torch.randn(TOKENS, 2 * V_HEADS)


@pytest.mark.parametrize("metadata", [None, {}, {"another layer": object()}])
def test_profiling_without_a_cache_gives_zeros(metadata: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    out = run(monkeypatch, SimpleNamespace(prefix="layer"), metadata, *make_inputs())
    assert not bool(out.any())


@pytest.mark.parametrize("dim_first", [True, False])
def test_a_padded_decode_step(dim_first: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer rows than tokens, as in a graph's captured size; the states are vLLM's, in either layout."""
    parameters = GdnParameters(
        conv_weight=torch.randn(CONV_DIM, WIDTH),
        A_log=torch.randn(V_HEADS),
        dt_bias=torch.randn(V_HEADS),
        norm_weight=torch.randn(VALUE_DIM),
        norm_eps=1e-6,
        num_k_heads=K_HEADS,
    )
    windows, states = torch.randn(4, CONV_DIM, WIDTH - 1), torch.randn(4, V_HEADS, VALUE_DIM, KEY_DIM)
    starts, ends, slots = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [1, 1], [2, 0]))
    rows = RecurrentRows(starts, ends, slots, slots, slots.unsqueeze(1), None, 1)
    qkvz, ba = make_inputs()
    own_windows, own_states, expected = windows.clone(), states.clone(), nan_like(TOKENS, V_HEADS, VALUE_DIM)
    a, b = ba[:, V_HEADS:], ba[:, :V_HEADS]
    gdn_step(qkvz, a, b, parameters, own_windows, own_states, expected, recurrent=rows)

    monkeypatch.setattr(gdn_layer, "is_conv_state_dim_first", lambda: dim_first)
    held = windows if dim_first else windows.transpose(1, 2).contiguous()
    layer: Any = SimpleNamespace(
        prefix="layer",
        kv_cache=(held, states),
        num_v_heads=V_HEADS,
        core_parameters=lambda: parameters,
        gates=lambda ba: Qwen3NextGdnLayer.gates(layer, ba),
        states=lambda: Qwen3NextGdnLayer.states(layer),
    )
    out = run(monkeypatch, layer, {"layer": Qwen3NextGdnMetadata(None, rows)}, qkvz, ba)
    assert bool(expected[0].any()) and not bool(expected[1:].any())
    assert torch.equal(out, expected) and torch.equal(states, own_states)
    assert torch.equal(held if dim_first else held.transpose(1, 2), own_windows)
