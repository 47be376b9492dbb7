"""FlashInfer's Gated Delta Net prefill as a :class:`.Peer`. The function is handed in: nothing is imported here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .peers import Peer, PeerCall

NAME = "flashinfer"


def flashinfer_peer(chunk_gated_delta_rule: Callable[..., Any]) -> Peer:
    """``flashinfer.gdn_prefill.chunk_gated_delta_rule`` (0.6.18 to 0.7.0): normalised q and k, exp(g), states [V, K].

    It compiles at its first call, one kernel for few rows and heads and one for many, and none by length.
    """
    # 0.7 may take a path that waits for the GPU to hear the lengths, unless told which to take; and it can keep
    # checkpoints however few rows there are, of which 0.6 warns at every call.
    newer = "backend" in inspect.signature(chunk_gated_delta_rule).parameters
    options: dict[str, Any] = {"backend": "flashinfer"} if newer else {}

    def run(call: PeerCall) -> tuple[Tensor, Tensor | None]:
        kept: Tensor | None = None
        extra = dict(options)
        # Rows shorter than the grid have nothing to keep but their final state.
        if call.keep_checkpoints and call.rows.checkpoints:
            kept = call.state.new_empty(call.rows.checkpoints, *call.state.shape[1:])
            extra |= {
                "state_checkpoints": kept,
                "checkpoint_cu_starts": call.rows.checkpoint_offsets,
                "checkpoint_every_n_tokens": call.rows.snapshot_grid,
            }
            if not newer:
                extra["use_cp"] = False
        # Apart from the initial states: with few rows several programs share one, and the first to end would write
        # what another has yet to read.
        final = torch.empty_like(call.state)
        chunk_gated_delta_rule(
            q=call.q,
            k=call.k,
            v=call.v,
            g=call.decay,
            beta=call.beta,
            scale=call.q.shape[-1] ** -0.5,
            initial_state=call.state,
            output_final_state=True,
            cu_seqlens=call.rows.cu_seqlens,
            output=call.out,
            output_state=final,
            **extra,
        )
        return final, kept

    return Peer(NAME, run, log_decay=False, checkpoints=True)
