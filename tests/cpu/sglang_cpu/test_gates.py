"""Gated norm and gates: against SGLang's own Triton kernels, in Triton's interpreter."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from qwen3next_sglang_cpu_standins.ops import gates

from tests.helpers import relative_error

elementwise: Any = pytest.importorskip("sglang.kernels.ops.elementwise.elementwise")


def test_gated_norm_reads_like_the_formula() -> None:
    x, z, weight = torch.randn(5, 8).double(), torch.randn(5, 8).double(), torch.randn(8).double()
    norm = SimpleNamespace(weight=weight, eps=1e-6, activation="silu")
    expected = weight * x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * z * torch.sigmoid(z)
    assert relative_error(gates.fused_rms_norm_gated(norm, x, z), expected) < 1e-14
    with pytest.raises(NotImplementedError):
        gates.fused_rms_norm_gated(norm, x, z, prenorm=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_gate_of_attention(inplace: bool) -> None:
    x, gate = torch.randn(3, 4 * 8), torch.randn(3, 4, 16)[..., 8:]  # heads of a wider projection
    expected = elementwise.fused_sigmoid_mul(x.clone(), gate)
    got = gates.fused_sigmoid_mul(x, gate, inplace=inplace)
    assert relative_error(got, expected.double()) < 1e-6
    assert (got.data_ptr() == x.data_ptr()) is inplace


def test_gate_of_the_shared_expert() -> None:
    hidden, weight = torch.randn(3, 64), torch.randn(64)
    shared, routed = torch.randn(3, 64), torch.randn(3, 64)
    expected = routed.clone()
    elementwise.fused_gate_sigmoid_mul_add(hidden, weight, shared, expected)
    gates.fused_gate_sigmoid_mul_add(hidden, weight, shared, routed)
    assert relative_error(routed, expected.double()) < 1e-6
