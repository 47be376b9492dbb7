"""Convolution and delta rule around slots, windows and states: against the formulas run over whole sequences."""

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops import gdn
from torch import Tensor

from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn.reference import delta_rule_recurrent, gdn_gates, l2_normalize
from tests.helpers import nan_like, relative_error

CHANNELS, WIDTH, SLOTS = 6, 4, 5
HEADS, VALUE_HEADS, K, V = 2, 4, 8, 5


def conv_case() -> tuple[Tensor, Tensor, Tensor]:
    """Weight, states and five inputs ``[D, T]`` that follow what slot 2 holds."""
    return torch.randn(CHANNELS, WIDTH), torch.randn(SLOTS, CHANNELS, WIDTH - 1), torch.randn(CHANNELS, 5)


def convolved(x: Tensor, weight: Tensor, history: Tensor | None) -> Tensor:
    y, _ = causal_conv(x.T[None].double(), weight.double(), None if history is None else history.T[None].double())
    return y[0].T


def test_prefill_of_the_convolution() -> None:
    weight, states, x = conv_case()
    before = states.clone()
    slots, fresh = torch.tensor([2, -1, 3]), torch.tensor([True, True, False])
    bounds = torch.tensor([0, 3, 4, 5])
    out = gdn.causal_conv1d_fn_cpu(x, weight, None, "silu", states, fresh, slots, bounds)
    assert relative_error(out[:, :3], convolved(x[:, :3], weight, before[2])) < 1e-6
    assert not out[:, 3].any()  # a padded row
    assert relative_error(out[:, 4:], convolved(x[:, 4:], weight, None)) < 1e-6
    assert torch.equal(states[2], x[:, :3]) and torch.equal(states[[0, 1, 4]], before[[0, 1, 4]])
    assert torch.equal(states[3], torch.cat([torch.zeros(CHANNELS, 2), x[:, 4:]], dim=1))


def test_decode_moves_the_window_on_and_verify_keeps_each_one() -> None:
    weight, states, x = conv_case()
    before, slots = states.clone(), torch.tensor([2, -1])
    drafts = torch.stack([x[:, :3], torch.randn(CHANNELS, 3)])
    windows = nan_like(3, 3, CHANNELS, WIDTH - 1)
    verified = gdn.causal_conv1d_update_cpu(drafts, states, weight, None, "silu", slots, windows, torch.tensor([1, 0]))
    assert torch.equal(states, before) and not verified[1].any()
    assert relative_error(verified[0], convolved(x[:, :3], weight, before[2])) < 1e-6
    for t in range(3):
        token = torch.stack([x[:, t], torch.randn(CHANNELS)])
        y = gdn.causal_conv1d_update_cpu(token, states, weight, None, "silu", slots)
        assert torch.equal(y[0], verified[0, :, t]) and torch.equal(windows[1, t], states[2])
    assert windows[[0, 2]].isnan().all()


def sequence(length: int) -> dict[str, Tensor]:
    parts = {"q": (HEADS, K), "k": (HEADS, K), "v": (VALUE_HEADS, V), "a": (VALUE_HEADS,), "b": (VALUE_HEADS,)}
    return {name: torch.randn(length, *shape) for name, shape in parts.items()}


A_LOG, DT_BIAS = torch.rand(VALUE_HEADS), torch.rand(VALUE_HEADS)


def rule(part: dict[str, Tensor], state: Tensor) -> tuple[Tensor, Tensor]:
    """The formula over one sequence in float64: output ``[T, HV, V]`` and final state ``[HV, V, K]``."""
    wide = {name: tensor.double() for name, tensor in part.items()}
    g, beta = gdn_gates(wide["a"], wide["b"], A_LOG, DT_BIAS)
    q, k = (l2_normalize(wide[name]).repeat_interleave(VALUE_HEADS // HEADS, dim=1) for name in ("q", "k"))
    o, last = delta_rule_recurrent(*(t[None] for t in (q, k, wide["v"], g, beta)), initial_state=state[None].double())
    return o[0], last[0]


def cut(part: dict[str, Tensor], first: int, last: int) -> dict[str, Tensor]:
    return {name: tensor[first:last] for name, tensor in part.items()}


@pytest.mark.parametrize("lengths", [(3, 70), (64, 0, 129)])
def test_prefill_of_the_rule_moves_states_and_hands_back_one_a_chunk(lengths: tuple[int, ...]) -> None:
    tokens = sequence(sum(lengths))
    states = torch.randn(SLOTS, VALUE_HEADS, V, K)
    before, slots = states.clone(), torch.arange(len(lengths)) + 1
    bounds = torch.tensor([0, *lengths]).cumsum(0)
    g, beta = gdn.fused_gdn_gating_cpu(A_LOG, tokens["a"], tokens["b"], DT_BIAS)
    qkv = (tokens[name][None] for name in ("q", "k", "v"))
    out, none, chunks = gdn.chunk_gated_delta_rule_cpu(*qkv, g, beta, states, bounds, False, True, slots)
    assert none is None and chunks is not None
    expected = []
    for row, slot in enumerate(slots.tolist()):
        first, last = int(bounds[row]), int(bounds[row + 1])
        for start in range(first, last, 64):
            expected.append(
                rule(cut(tokens, first, start), before[slot])[1] if start > first else before[slot].double()
            )
        if last > first:
            o, state = rule(cut(tokens, first, last), before[slot])
            assert relative_error(out[0, first:last], o) < 1e-5 and relative_error(states[slot], state) < 1e-5
    assert relative_error(chunks[0], torch.stack(expected)) < 1e-5
    assert torch.equal(states[0], before[0])


def test_verify_keeps_every_state_and_decode_moves_it() -> None:
    tokens, length = sequence(3), 3
    states = torch.randn(SLOTS, VALUE_HEADS, V, K)
    before, kept = states.clone(), nan_like(2, length, VALUE_HEADS, V, K)
    qkv = [tokens[name][None] for name in ("q", "k", "v")]
    gates = (tokens["a"], tokens["b"])
    out = gdn.fused_sigmoid_gating_delta_rule_update_cpu(
        A_LOG,
        DT_BIAS,
        *qkv,
        *gates,
        states,
        torch.tensor([3]),
        torch.tensor([0, length]),
        disable_state_update=True,
        intermediate_states_buffer=kept,
        intermediate_state_indices=torch.tensor([1]),
    )
    assert torch.equal(states, before) and kept[0].isnan().all()
    assert relative_error(out[0], rule(tokens, before[3])[0]) < 1e-6
    for t in range(length):
        token = [tensor[:, t : t + 1] for tensor in qkv]
        one = (gate[t : t + 1] for gate in gates)
        y = gdn.fused_sigmoid_gating_delta_rule_update_cpu(
            A_LOG, DT_BIAS, *token, *one, states, torch.tensor([3, -1]), torch.tensor([0, 1, 1])
        )
        assert torch.equal(y[0, 0], out[0, t]) and torch.equal(states[3], kept[1, t])
        assert relative_error(states[3], rule(cut(tokens, 0, t + 1), before[3])[1]) < 1e-6


def test_trees_are_refused() -> None:
    with pytest.raises(NotImplementedError, match="only chains"):
        zeros = torch.zeros(1, 1)
        gdn.causal_conv1d_update_cpu(
            zeros, zeros[None], zeros, None, "silu", torch.tensor([0]), retrieve_parent_token=zeros
        )
