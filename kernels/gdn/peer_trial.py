"""One call of an engine's prefill function at start: it builds what must be built, and shows that we call it right."""

from __future__ import annotations

from functools import partial

import torch

from ..offers import problem_of
from .packed import PackedRows
from .peers import HeadShape, Peer, run_peer

MOST_ERROR = 3e-2
"""A peer whose outputs or states differ from our own by more (relative norm, bfloat16 tokens) is not used."""

LENGTH = 200
"""Tokens a row: three whole chunks and a part of one."""


def trial(peer: Peer, shape: HeadShape, device: torch.device, snapshot_grid: int | None) -> str | None:
    """What is wrong with ``peer`` for this shape on this device, in one clause; None if nothing is.

    With one row, and with enough rows to fill the GPU: FlashInfer has a kernel for either.
    """
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1
    for rows in sorted({1, -(-processors // shape.num_v_heads)}):
        problem = problem_of(partial(_error, peer, shape, device, snapshot_grid, rows), MOST_ERROR)
        if problem is not None:
            return problem
    return None


def _error(peer: Peer, shape: HeadShape, device: torch.device, snapshot_grid: int | None, rows: int) -> float:
    """The largest relative error of outputs, final states and snapshots against our own kernels'."""
    from .triton_prefill import gdn_prefill

    random = torch.Generator(device="cpu").manual_seed(0)

    def normal(*sizes: int, dtype: torch.dtype = shape.dtype) -> torch.Tensor:
        drawn = torch.randn(*sizes, generator=random, dtype=torch.float32, device="cpu")
        return drawn.to(dtype).to(device)

    k_heads, v_heads, key_dim, value_dim, _ = shape
    tokens = rows * LENGTH
    mixed_qkv = normal(tokens, 2 * k_heads * key_dim + v_heads * value_dim)
    gates = (
        normal(tokens, v_heads),
        normal(tokens, v_heads),
        normal(v_heads, dtype=torch.float32),
        normal(v_heads, dtype=torch.float32),
    )
    # The first half of the slots is the rows' own, the second takes snapshots.
    state = normal(2 * rows, v_heads, value_dim, key_dim, dtype=torch.float32)
    ints = partial(torch.tensor, dtype=torch.int32, device=device)
    starts = ints([row * LENGTH for row in range(rows)])
    slots = ints(list(range(rows)))
    has_state = torch.tensor([row % 2 == 0 for row in range(rows)], device=device)
    snapshot = None
    if snapshot_grid is not None:
        position = snapshot_grid if snapshot_grid < LENGTH else LENGTH
        snapshot = (ints([position] * rows), ints(list(range(rows, 2 * rows))))
    packed = PackedRows.of([LENGTH] * rows, device, snapshot_grid=snapshot_grid or PackedRows.snapshot_grid)
    results = []
    for run in (gdn_prefill, partial(run_peer, peer, packed)):
        states = state.clone()
        out = torch.empty(tokens, v_heads, value_dim, dtype=shape.dtype, device=device)
        run(
            mixed_qkv,
            gates,
            states,
            k_heads,
            starts,
            starts + LENGTH,
            LENGTH,
            slots,
            has_state,
            out,
            snapshot,
        )
        results.append((out.float(), states[:rows], states[rows:]))
    errors = [float((got - own).norm() / own.norm()) for own, got in zip(*results, strict=True)]
    return max(errors, key=lambda error: float("inf") if error != error else error)
