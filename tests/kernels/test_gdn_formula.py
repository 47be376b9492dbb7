"""The differentiable forms of the gated delta rule: chunked against recurrent, and recurrent against the formula."""

import pytest
import torch
from torch import Tensor

from qwen3next_plugin.kernels.gdn.reference import (
    delta_rule_chunked,
    delta_rule_recurrent,
    gdn_gates,
    l2_normalize,
)

from .common import assert_close
from .gdn_case import formula, make_tokens

LENGTHS = (1, 2, 63, 64, 65, 130)


def arguments(length: int, dtype: torch.dtype = torch.float64, device: str = "cpu") -> tuple[Tensor, ...]:
    """q, k, v, g, beta and an initial state: 2 sequences, 3 heads, K = 12, V = 5."""

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, device=device)

    q, k = l2_normalize(random(2, length, 3, 12)), l2_normalize(random(2, length, 3, 12))
    g, beta = gdn_gates(random(2, length, 3) * 3, random(2, length, 3), random(3), random(3))
    return tuple(t.to(dtype) for t in (q, k, random(2, length, 3, 5), g, beta, random(2, 3, 5, 12)))


@pytest.mark.parametrize("length", LENGTHS)
def test_recurrent_is_the_formula(length: int) -> None:
    tokens = make_tokens(length, "cpu", heads=(1, 2), dims=(12, 5), dtype=torch.float32)
    x, a, b, A_log, dt_bias = (t.double() for t in tokens.arguments())
    q, k = (l2_normalize(part).view(1, length, 1, 12).expand(-1, -1, 2, -1) for part in (x[:, :12], x[:, 12:24]))
    g, beta = gdn_gates(a[None], b[None], A_log, dt_bias)
    start = torch.randn(1, 2, 5, 12, dtype=torch.float64)
    o, state = delta_rule_recurrent(q, k, x[:, 24:].view(1, length, 2, 5), g, beta, start)
    expected, states = formula(tokens, 0, length, start[0])
    assert_close((o[0], state[0]), (expected, states[-1]), 1e-12)


@pytest.mark.parametrize("chunk_size", [1, 16, 64])
@pytest.mark.parametrize("with_state", [False, True])
@pytest.mark.parametrize("length", LENGTHS)
def test_chunked_is_recurrent(length: int, with_state: bool, chunk_size: int, device: str) -> None:
    *inputs, state = arguments(length, device=device)
    initial = state if with_state else None
    expected = delta_rule_recurrent(*inputs, initial)
    assert_close(delta_rule_chunked(*inputs, initial, chunk_size), expected, 1e-12)


@pytest.mark.parametrize("length", [1, 65, 130])
def test_gradients_agree(length: int) -> None:
    inputs = [t.detach().requires_grad_() for t in arguments(length)]
    gradients = []
    for form in (delta_rule_recurrent, delta_rule_chunked):
        o, state = form(*inputs)
        gradients.append(torch.autograd.grad(o.sin().sum() + state.cos().sum(), inputs))
    assert_close(gradients[1], gradients[0], 1e-11)


def test_gradcheck() -> None:
    q, k, v, g, beta, state = (t[:1] for t in arguments(4))
    small = (q[:, :, :1, :2], k[:, :, :1, :2], v[:, :, :1, :2], g[:, :, :1], beta[:, :, :1], state[:, :1, :2, :2])
    inputs = [t.detach().clone().requires_grad_() for t in small]
    assert torch.autograd.gradcheck(lambda *t: delta_rule_chunked(*t, chunk_size=3), inputs)


def test_float32_stays_close_over_many_chunks() -> None:
    inputs = arguments(700)
    actual = delta_rule_chunked(*(t.float() for t in inputs))
    assert actual[0].dtype == actual[1].dtype == torch.float32
    assert_close(actual, delta_rule_recurrent(*inputs), 1e-5)


def test_bfloat16_values_give_bfloat16_outputs_and_a_float32_state() -> None:
    inputs = arguments(70, torch.bfloat16)
    o, state = delta_rule_chunked(*inputs)
    assert (o.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert_close((o, state), delta_rule_recurrent(*(t.double() for t in inputs)), 3e-3)


def test_strong_decay_neither_overflows_nor_poisons_gradients() -> None:
    *inputs, state = arguments(130)
    inputs[3] = inputs[3] * 0 - 800.0  # exp(800) would be infinite
    tensors = [t.detach().requires_grad_() for t in (*inputs, state)]
    o, final = delta_rule_chunked(*tensors)
    assert_close((o, final), delta_rule_recurrent(*tensors), 1e-12)
    assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(o.sum() + final.sum(), tensors))


def test_repeated_keys_that_are_never_forgotten() -> None:
    """The system's powers grow like binomial coefficients here: forward substitution does not mind."""
    *inputs, state = arguments(128)
    inputs[1] = inputs[1][:, :1].expand_as(inputs[1])
    inputs[3], inputs[4] = inputs[3] * 0, inputs[4] * 0 + 1
    assert_close(delta_rule_chunked(*inputs, state), delta_rule_recurrent(*inputs, state), 1e-11)


def test_no_tokens_keep_the_state() -> None:
    *inputs, state = arguments(0)
    for form in (delta_rule_recurrent, delta_rule_chunked):
        o, final = form(*inputs, state)
        assert o.shape == (2, 0, 3, 5)
        assert torch.equal(final, state)


def test_gates() -> None:
    a, b, A_log, dt_bias = (torch.randn(4, 3) * 4, torch.randn(4, 3), torch.randn(3), torch.randn(3))
    g, beta = gdn_gates(a.bfloat16(), b.bfloat16(), A_log, dt_bias)
    assert g.dtype == beta.dtype == torch.float32
    wide = a.bfloat16().double()
    expected = -A_log.double().exp() * torch.log1p((wide + dt_bias.double()).exp())
    assert_close((g, beta), (expected, 1 / (1 + (-b.bfloat16().double()).exp())), 1e-6)
    assert bool((g <= 0).all())


def test_l2_normalize_of_zeros_is_zeros() -> None:
    assert torch.equal(l2_normalize(torch.zeros(2, 4)), torch.zeros(2, 4))
