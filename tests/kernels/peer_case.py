"""The delta rule behind the calling conventions of the engines' prefill functions."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.kernels import offers
from qwen3next_plugin.kernels.gdn import config, peers
from qwen3next_plugin.kernels.gdn.peer_trial import trial
from qwen3next_plugin.kernels.gdn.peers import HeadShape, Peer
from qwen3next_plugin.kernels.gdn.reference import delta_rule_chunked
from qwen3next_plugin.kernels.gdn.table import PrefillRule, PrefillWay

DIM = 16
CPU = torch.device("cpu")


def delta_rule_part(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, part: slice, state: Tensor
) -> tuple[Tensor, Tensor]:
    """Outputs and the state after a part of the tokens; q, k ``[T, HK, K]``, state ``[1, HV, V, K]``."""
    group = v.shape[1] // q.shape[1]
    q, k = (x[None, part].repeat_interleave(group, dim=2) for x in (q, k))
    o, state = delta_rule_chunked(q, k, v[None, part], g[None, part], beta[None, part], state)
    return o[0], state


def delta_rule_rows(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, states: Tensor, cu_seqlens: Tensor, out: Tensor
) -> Tensor:
    """Fill ``out`` row by row and return the final states; g is the log decay."""
    final = torch.empty_like(states)
    for row, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
        part = slice(start, end)
        out[part], final[row] = delta_rule_part(q, k, v, g, beta, part, states[row, None])
    return final


class FakeFlashInfer:
    """The delta rule behind FlashInfer's signature: exp(g), normalised q and k, unscaled, states [N, HV, V, K]."""

    def __init__(self, **spoiled: Any) -> None:
        self.calls: list[dict[str, Any]] = []
        self.spoiled = spoiled

    def __call__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        g: Tensor,
        beta: Tensor,
        scale: float,
        initial_state: Tensor,
        output_final_state: bool,
        cu_seqlens: Tensor,
        output: Tensor,
        output_state: Tensor,
        state_checkpoints: Tensor | None = None,
        checkpoint_cu_starts: Tensor | None = None,
        checkpoint_every_n_tokens: int = 0,
        backend: str = "auto",
    ) -> tuple[Tensor, Tensor]:
        assert all(x.is_contiguous() for x in (q, k, v, g, beta, initial_state, output, output_state))
        assert scale == q.shape[-1] ** -0.5 and output_final_state and backend == "flashinfer"
        assert g.dtype == beta.dtype == initial_state.dtype == torch.float32 and cu_seqlens.dtype == torch.int64
        self.calls.append({"tokens": len(q), "rows": len(initial_state), "every": checkpoint_every_n_tokens})
        for row, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True)):
            cuts = [start, end]
            if checkpoint_every_n_tokens:
                cuts = [*range(start, end, checkpoint_every_n_tokens), end]
            state = initial_state[row, None]
            if self.spoiled.get("transposed"):
                state = state.transpose(-1, -2)
            for i, (first, last) in enumerate(zip(cuts, cuts[1:], strict=False)):
                o, state = delta_rule_part(q, k, v, g.log(), beta, slice(first, last), state)
                output[first:last] = o
                if checkpoint_every_n_tokens and (last - start) % checkpoint_every_n_tokens == 0:
                    assert state_checkpoints is not None and checkpoint_cu_starts is not None
                    state_checkpoints[checkpoint_cu_starts[row] + i] = state[0]
            output_state[row] = state[0]
        return output, output_state


def small(peer: Peer) -> Peer:
    """The peer for heads and a type that the interpreter gets through."""
    return replace(peer, dtypes=(torch.float32,), head_dim=DIM)


@contextmanager
def empty_registry(*rules: tuple[str, int, int]) -> Iterator[None]:
    """No offers before, none after; who runs from how many tokens on, and how many a row."""
    peers.OFFERS.withdraw_all()
    table = config.table_of(CPU)
    added = tuple(PrefillRule(PrefillWay(name), tokens, mean, "a test") for name, tokens, mean in rules)
    try:
        with config.forced(replace(table, prefill=(*added, *table.prefill))):
            yield
    finally:
        peers.OFFERS.prefer(offers.AUTO)
        peers.OFFERS.withdraw_all()


def check_adapter(peer_of: Callable[[Callable[..., Any]], Peer], fake: Callable[..., Any], real: Any) -> None:
    """An adapter's peer, around ``fake``, agrees with our own kernels, and calls what ``real`` would take.

    ``fake`` has the engine's convention; ``real`` is the engine's function, which is not run.
    """
    signature = inspect.signature(real)
    calls = []

    def checked(*args: Any, **kwargs: Any) -> Any:
        calls.append(signature.bind(*args, **kwargs))
        return fake(*args, **kwargs)

    shape = HeadShape(1, 2, DIM, DIM, torch.float32)
    assert trial(small(peer_of(checked)), shape, torch.device("cpu"), None) is None
    assert calls


def check_installed(peer: Peer, snapshot_grid: int | None = None) -> None:
    """What is installed agrees with our own kernels at the published model's heads, whole and for two ranks."""
    for ranks in (1, 2):
        shape = HeadShape(16 // ranks, 32 // ranks, 128, 128, torch.bfloat16)
        assert trial(peer, shape, torch.device("cuda", torch.cuda.current_device()), snapshot_grid) is None
