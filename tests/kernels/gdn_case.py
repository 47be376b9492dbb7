"""Inputs of the gated delta rule's operations, and the float64 formula written out once more, token by token."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qwen3next_plugin.kernels import gdn
from qwen3next_plugin.kernels.gdn import config, triton_tiled
from qwen3next_plugin.kernels.gdn.table import MERGING
from tests.helpers import nan_like, relative_error

from .common import tolerance
from .slots import (
    Row,
    assert_only_these_slots_changed,
    assert_only_these_tokens_written,
    clone_layout,
    column_slice,
    fill_slots,
    ints,
    poisoned_state,
    ranges,
    strided_slots,
)


@dataclass
class Tokens:
    """The token-side arguments of every operation."""

    mixed_qkv: Tensor
    a: Tensor
    b: Tensor
    A_log: Tensor
    dt_bias: Tensor
    k_heads: int
    key_dim: int
    value_dim: int

    @property
    def v_heads(self) -> int:
        return self.A_log.shape[0]

    @property
    def device(self) -> str:
        return self.mixed_qkv.device.type

    def arguments(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.mixed_qkv, self.a, self.b, self.A_log, self.dt_bias

    def state(self, slots: int, dtype: torch.dtype = torch.float32, layout: str = "contiguous") -> Tensor:
        """A poisoned ssm_state."""
        return poisoned_state((slots, self.v_heads, self.value_dim, self.key_dim), dtype, self.device, layout)

    def out(self) -> Tensor:
        """A poisoned output; its heads lie apart, as in a buffer padded to a multiple."""
        shape = (self.mixed_qkv.shape[0], self.v_heads, self.value_dim + 3)
        return nan_like(*shape, dtype=self.mixed_qkv.dtype, device=self.device)[..., : self.value_dim]


def make_tokens(
    tokens: int,
    device: str,
    heads: tuple[int, int] = (1, 2),
    dims: tuple[int, int] = (16, 8),
    dtype: torch.dtype = torch.float32,
) -> Tokens:
    """Random tokens with (key heads, value heads) and (key dim, value dim); inputs are slices of wider projections."""
    (k_heads, v_heads), (key_dim, value_dim) = heads, dims
    columns = 2 * k_heads * key_dim + v_heads * value_dim
    gates = column_slice(tokens, 2 * v_heads, dtype, device)
    return Tokens(
        mixed_qkv=column_slice(tokens, columns, dtype, device),
        a=gates[:, v_heads:],
        b=gates[:, :v_heads],
        A_log=torch.randn(v_heads, device=device) * 0.5,
        dt_bias=torch.randn(v_heads, device=device),
        k_heads=k_heads,
        key_dim=key_dim,
        value_dim=value_dim,
    )


def formula(
    tokens: Tokens, start: int, end: int, initial: Tensor | None, every_state: bool = False
) -> tuple[Tensor, Tensor]:
    """o [n, HV, V] of tokens start..end and the state after the last, or after each, [1 or n, HV, V, K].

    In float64 on the CPU.
    """
    x, a, b, A_log, dt_bias = (t.detach().cpu().double() for t in tokens.arguments())
    keys = tokens.k_heads * tokens.key_dim
    group = tokens.v_heads // tokens.k_heads
    k_head_of = torch.arange(tokens.v_heads) // group
    shape = (tokens.v_heads, tokens.value_dim, tokens.key_dim)
    S = torch.zeros(shape, dtype=torch.float64) if initial is None else initial.detach().cpu().double()
    outputs: list[Tensor] = []
    states: list[Tensor] = []
    for t in range(start, end):
        q = x[t, :keys].view(tokens.k_heads, -1)[k_head_of]
        k = x[t, keys : 2 * keys].view(tokens.k_heads, -1)[k_head_of]
        v = x[t, 2 * keys :].view(tokens.v_heads, -1)
        q = q / (q.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt() / tokens.key_dim**0.5
        k = k / (k.pow(2).sum(-1, keepdim=True) + 1e-6).sqrt()
        alpha = torch.exp(-torch.exp(A_log) * torch.log1p(torch.exp(a[t] + dt_bias)))
        beta = 1 / (1 + torch.exp(-b[t]))
        S = alpha[:, None, None] * S
        S = S + torch.einsum("hv,hk->hvk", beta[:, None] * (v - torch.einsum("hvk,hk->hv", S, k)), k)
        outputs.append(torch.einsum("hvk,hk->hv", S, q))
        states = [*states, S] if every_state else [S]
    if not outputs:
        return torch.zeros(0, *shape[:2], dtype=torch.float64), torch.zeros(0, *shape, dtype=torch.float64)
    return torch.stack(outputs), torch.stack(states)


def over_tiles(tokens: Tokens) -> bool:
    """Whether a prefill by Triton runs the kernels over tiles."""
    own = config.own_prefill(config.table_of(tokens.mixed_qkv.device), 1, 1)
    return own.inverse == MERGING and triton_tiled.can_take(tokens.mixed_qkv, tokens.key_dim, tokens.value_dim)


def limit(rounded_to: torch.dtype, tokens: Tokens, backend: str | None, chunked: bool = False) -> float:
    """Allowed error of something stored as `rounded_to`: float32 sums, one rounding, and on a GPU the dots' own."""
    error = 1e-5
    if chunked and backend == "triton" and over_tiles(tokens):
        error = 2e-3  # factors of the inverse in float16
    if chunked and tokens.device == "cuda" and backend != "reference":
        error = {torch.float32: 2e-5, torch.float16: 5e-3, torch.bfloat16: 1e-2}[tokens.mixed_qkv.dtype]
    if rounded_to is not torch.float32:
        error += tolerance(rounded_to, 1, backend or "reference", tokens.device)
    return error


def assert_error(actual: Tensor, expected: Tensor, allowed: float, what: str, least: float = 0.0) -> None:
    """least: of a value, on average, below which errors are relative to it: what was summed may have cancelled."""
    error = relative_error(actual, expected)
    typical = float(expected.double().pow(2).mean().sqrt())
    if 0.0 < typical < least:
        error *= typical / least
    assert error <= allowed, f"{what}: relative error {error:.2e}, allowed {allowed:.2e}"


def run_prefill(
    tokens: Tokens, state: Tensor, rows: Sequence[Row], has_state: Sequence[bool], backend: str | None
) -> Tensor:
    """Call gdn_prefill on these rows; returns its poisoned-before output."""
    out = tokens.out()
    gdn.gdn_prefill(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, tokens.device),
        max_query_len=max((end - start for start, end, _ in rows), default=0),
        state_slots=strided_slots([slot for _, _, slot in rows], tokens.device),
        has_initial_state=torch.tensor(has_state, dtype=torch.bool, device=tokens.device),
        out=out,
        backend=backend,
    )
    return out


def check_prefill(
    tokens: Tokens,
    rows: Sequence[Row],
    has_state: Sequence[bool],
    backend: str | None,
    state_dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    slots: int = 6,
    slack: float = 1.0,
) -> None:
    """Prefill from a poisoned state and compare outputs and states with the formula; nothing else may move.

    slack: times the usual limits, where tokens make more of a rounding.
    """
    state = tokens.state(slots, state_dtype, layout)
    running = [(row, has) for row, has in zip(rows, has_state, strict=True) if row[2] >= 0 and row[1] > row[0]]
    fill_slots(state, [row[2] for row, has in running if has], 0.3)
    before = clone_layout(state)
    out = run_prefill(tokens, state, rows, has_state, backend)
    for (start, end, slot), has in running:
        o, states = formula(tokens, start, end, before[slot] if has else None)
        allowed = slack * limit(out.dtype, tokens, backend, True)
        assert_error(out[start:end], o, allowed, f"tokens {start}..{end}", least=1e-3)
        assert_error(state[slot], states[-1], slack * limit(state_dtype, tokens, backend, True), f"slot {slot}")
    assert_only_these_slots_changed(before, state, [row[2] for row, _ in running])
    assert_only_these_tokens_written(out, rows)


def decode(tokens: Tokens, state: Tensor, rows: Sequence[Row], out: Tensor, backend: str | None) -> None:
    """Call gdn_decode on these rows of one token."""
    gdn.gdn_decode(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, tokens.device),
        state_slots=strided_slots([slot for _, _, slot in rows], tokens.device),
        out=out,
        backend=backend,
    )


def verify(
    tokens: Tokens,
    state: Tensor,
    rows: Sequence[Row],
    output_slots: Sequence[Sequence[int]],
    out: Tensor,
    backend: str | None,
) -> None:
    """Call gdn_verify on these rows, each starting from its slot."""
    table = torch.tensor([list(slots) for slots in output_slots], dtype=torch.int32, device=tokens.device)
    gdn.gdn_verify(
        *tokens.arguments(),
        state,
        num_k_heads=tokens.k_heads,
        **ranges(rows, tokens.device),
        max_query_len=table.shape[1],
        initial_slots=ints([slot for _, _, slot in rows], tokens.device),
        output_slots=table,
        out=out,
        backend=backend,
    )
