"""A state in float16, which bfloat16 should give way to: what does not fit stops at the type's end, and is finite."""

import pytest
import torch

from qwen3next_plugin.kernels import gdn

from .common import BACKENDS
from .gdn_case import make_tokens
from .slots import ints

LARGEST = 65504.0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("operation", ["prefill", "decode"])
@pytest.mark.parametrize("value", [3e6, -3e6, float("nan")])
def test_what_float16_cannot_hold(value: float, operation: str, backend: str, device: str) -> None:
    """Large values fill a state beyond the type's end; those that are no numbers are not hidden."""
    tokens = make_tokens(1, device)
    tokens.mixed_qkv[:, -2 * tokens.value_dim :] = value
    tokens.b.fill_(9.0)
    state = torch.zeros(1, tokens.v_heads, tokens.value_dim, tokens.key_dim, device=device)
    small = state.half()
    rows = {"query_start": ints([0], device), "query_end": ints([1], device), "state_slots": ints([0], device)}
    for kept in (state, small):
        options = rows | {"num_k_heads": tokens.k_heads, "out": tokens.out(), "backend": backend}
        if operation == "prefill":
            none = torch.zeros(1, dtype=torch.bool, device=device)
            gdn.gdn_prefill(*tokens.arguments(), kept, max_query_len=1, has_initial_state=none, **options)
        else:
            gdn.gdn_decode(*tokens.arguments(), kept, **options)
    assert state.abs().max() > LARGEST or value != value
    assert torch.equal(small, state.clamp(-LARGEST, LARGEST).half()) or (value != value and bool(small.isnan().all()))
