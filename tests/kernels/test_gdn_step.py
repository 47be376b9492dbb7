"""A step of any mixture of rows: every token's normed and gated output against float64, zeros for padding."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn import config, step
from qwen3next_plugin.kernels.gdn.table import StatesRule, StatesTile
from qwen3next_plugin.kernels.norm.reference import rms_norm_gated
from tests.helpers import nan_like, relative_error

from .gdn_case import Tokens, formula
from .slots import ints

K_HEADS, V_HEADS, KEY_DIM, VALUE_DIM, WIDTH, SLOTS = 2, 4, 8, 4, 4, 8
CONV_DIM = 2 * K_HEADS * KEY_DIM + V_HEADS * VALUE_DIM
OPERATIONS = (
    "causal_conv1d_update",
    "gdn_prefill",
    "gdn_decode",
    "gdn_decode_fused",
    "gdn_verify",
    "gdn_verify_fused",
    "gdn_verify_states",
    "rms_norm_gated",
)
pytestmark = pytest.mark.usefixtures("poisoned_memory")


class Step:
    """One layer's tokens and states in float32; slot n holds a sequence's states before the step."""

    def __init__(self, tokens: int, device: str) -> None:
        self.device = device
        self.qkvz = torch.randn(tokens, CONV_DIM + V_HEADS * VALUE_DIM, device=device)
        self.ba = torch.randn(tokens, 2 * V_HEADS, device=device)
        self.parameters = step.GdnParameters(
            conv_weight=torch.randn(CONV_DIM, WIDTH, device=device),
            A_log=torch.randn(V_HEADS, device=device) * 0.5,
            dt_bias=torch.randn(V_HEADS, device=device),
            norm_weight=torch.randn(VALUE_DIM, device=device),
            norm_eps=1e-6,
            num_k_heads=K_HEADS,
        )
        self.windows = torch.randn(SLOTS, CONV_DIM, WIDTH + 1, device=device)
        self.states = torch.randn(SLOTS, V_HEADS, VALUE_DIM, KEY_DIM, device=device)

    def expected(self, start: int, end: int, slot: int | None, first: int = 0) -> Tensor:
        """Float64 [n, HV, V] of a row whose window starts in column `first` of its slot; without one, from nothing."""
        p = self.parameters
        window = None if slot is None else self.windows[slot, :, first : first + WIDTH - 1].T[None].cpu().double()
        state = None if slot is None else self.states[slot]
        qkvz, ba = self.qkvz[start:end].cpu().double(), self.ba[start:end].cpu()
        y, _ = causal_conv(qkvz[None, :, :CONV_DIM], p.conv_weight.cpu().double(), window)
        sizes = (K_HEADS, KEY_DIM, VALUE_DIM)
        tokens = Tokens(y[0], ba[:, V_HEADS:], ba[:, :V_HEADS], p.A_log.cpu(), p.dt_bias.cpu(), *sizes)
        o, _ = formula(tokens, 0, end - start, state)
        z = qkvz[:, CONV_DIM:].unflatten(-1, (V_HEADS, VALUE_DIM))
        return rms_norm_gated(o, z, p.norm_weight.cpu().double(), p.norm_eps)

    def run(self, **rows: Any) -> Tensor:
        """The step's output over poison; the states given stay as they were, for `expected`."""
        out = nan_like(len(self.qkvz), V_HEADS, VALUE_DIM, device=self.device)
        a, b = self.ba[:, V_HEADS:], self.ba[:, :V_HEADS]
        step.gdn_step(self.qkvz, a, b, self.parameters, self.windows.clone(), self.states.clone(), out, **rows)
        return out


def recurrent(rows: list[tuple[int, int, int]], device: str, **others: Any) -> step.RecurrentRows:
    starts, ends, slots = (ints(values, device) for values in zip(*rows, strict=True))
    options: dict[str, Any] = {"output_slots": slots.unsqueeze(1), "num_accepted_tokens": None, "max_query_len": 1}
    return step.RecurrentRows(starts, ends, slots, slots, **(options | others))


def prefill(start: int, end: int, slot: int, has_state: bool, device: str) -> step.PrefillRows:
    has = torch.tensor([has_state], device=device)
    return step.PrefillRows(ints([start], device), ints([end], device), ints([slot], device), has, end - start)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the operations that a step calls, as it calls them."""
    made: list[str] = []

    def recording(name: str, operation: Callable[..., None]) -> Callable[..., None]:
        def call(*args: Any, **options: Any) -> None:
            made.append(name)
            operation(*args, **options)

        return call

    for name in OPERATIONS:
        monkeypatch.setattr(step, name, recording(name, getattr(step, name)))
    return made


def assert_outputs(out: Tensor, expected: dict[tuple[int, int], Tensor]) -> None:
    padding = torch.ones(len(out), dtype=torch.bool)
    for (start, end), wanted in expected.items():
        padding[start:end] = False
        assert relative_error(out[start:end], wanted) < 1e-5, f"tokens {start}..{end}"
    assert not bool(out.cpu()[padding].any()), "padding has outputs"


def test_a_step_that_only_decodes_is_one_operation(calls: list[str], device: str) -> None:
    this = Step(4, device)
    out = this.run(recurrent=recurrent([(0, 1, 3), (1, 2, -1), (2, 3, 5), (3, 3, 0)], device))
    assert calls == ["gdn_decode_fused"]
    assert_outputs(out, {(0, 1): this.expected(0, 1, 3), (2, 3): this.expected(2, 3, 5)})


def test_decode_beside_a_prompt_is_normed_once(calls: list[str], device: str) -> None:
    this = Step(9, device)
    rows = recurrent([(0, 1, 3), (1, 2, 6)], device)
    out = this.run(recurrent=rows, prefill=prefill(2, 8, 1, False, device))
    assert calls.count("rms_norm_gated") == 1 and "gdn_decode_fused" not in calls
    expected = {(n, n + 1): this.expected(n, n + 1, slot) for n, slot in ((0, 3), (1, 6))}
    assert_outputs(out, expected | {(2, 8): this.expected(2, 8, None)})


@pytest.mark.parametrize("programs", [2 * V_HEADS, 2 * V_HEADS + 1])
def test_verification_in_slots_of_its_own(programs: int, calls: list[str], device: str) -> None:
    """One operation from so many programs on as the table says, else one after another."""
    this = Step(6, device)
    rule = StatesRule(4, 2, programs, StatesTile(16, 2), "a test")
    accepted, places = ints([1, 2], device), torch.tensor([[3, 4], [5, 6]], device=device)
    # Of the second, two tokens were accepted, so its window stands one column further on.
    rows = recurrent([(0, 2, 3), (2, 4, 5)], device, output_slots=places, num_accepted_tokens=accepted, max_query_len=2)
    with config.forced(replace(config.table_of(torch.device(device)), states=(rule,))):
        out = this.run(recurrent=rows)
        assert_outputs(out, {(0, 2): this.expected(0, 2, 3), (2, 4): this.expected(2, 4, 5, first=1)})
        one_by_one = ["causal_conv1d_update", "gdn_verify", "rms_norm_gated"]
        assert calls == (["gdn_verify_states"] if programs == 2 * V_HEADS else one_by_one)
        calls.clear()
        this.run(recurrent=rows, prefill=prefill(4, 6, 1, False, device))
        assert "gdn_verify_states" not in calls, "beside prompts"


def test_drafts_are_one_operation_and_come_alone(calls: list[str], device: str) -> None:
    this = Step(4, device)
    rows = step.DraftRows(ints([0, 2], device), ints([2, 4], device), ints([2, -1], device), 2)
    record = step.DraftRecords.allocate(
        1,
        2,
        2,
        num_k_heads=K_HEADS,
        num_v_heads=V_HEADS,
        head_k_dim=KEY_DIM,
        head_v_dim=VALUE_DIM,
        input_dtype=torch.float32,
        device=device,
    ).layer(0)
    out = this.run(drafts=(rows, record))
    assert calls == ["gdn_verify_fused"]
    assert_outputs(out, {(0, 2): this.expected(0, 2, 2)})
    with pytest.raises(ValueError, match="drafts come with other rows"):
        this.run(drafts=(rows, record), recurrent=recurrent([(3, 4, 1)], device))


def test_a_step_without_rows(device: str) -> None:
    assert_outputs(Step(3, device).run(), {})
