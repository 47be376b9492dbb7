"""One step of an engine's grouped product at start: it builds what must be built, and shows that we call it right."""

from __future__ import annotations

from functools import partial

import torch

from ..gemm.reference import FP8, GROUP
from ..offers import problem_of
from . import peer_table
from .config import default_config, forced
from .peers import ExpertShape, Peer, Plan, rows_for

TOKENS, TOP_K = 512, 8


def trial(peer: Peer, shape: ExpertShape, device: torch.device, alignment: int) -> str | None:
    """What is wrong with ``peer`` for experts of this shape on this device, in one clause; None if nothing is."""
    return problem_of(partial(_error, peer, shape, device, alignment), peer_table.MOST_ERROR)


def _error(peer: Peer, shape: ExpertShape, device: torch.device, alignment: int) -> float:
    """The largest relative error of a token's output against our own kernels'.

    Factors differ by blocks and groups, so that a wrong one shows; experts are unequally busy, some not at all.
    """
    from .triton import fused_moe
    from .triton.by_peer import fused_moe_by_peer

    random = torch.Generator(device=device).manual_seed(0)
    experts, hidden, inner = shape
    top_k = min(TOP_K, experts)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(*sizes, generator=random, dtype=torch.float32, device=device)

    def weights(rows: int, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """An expert's rows are the one's before, moved on by one: all of them in float32 need not fit."""
        first = (100 * normal(rows, columns)).clamp(-448, 448).to(FP8).view(torch.uint8)
        codes = torch.empty(experts, rows, columns, dtype=FP8, device=device)
        for expert in range(experts):
            codes[expert].view(torch.uint8).copy_(first.roll(expert, 0))
        return codes, (normal(experts, rows // GROUP, columns // GROUP) / 2).exp() / (100 * columns**0.5)

    (w13, w13_scale), (w2, w2_scale) = weights(2 * inner, hidden), weights(hidden, inner)
    x = ((normal(TOKENS, hidden // GROUP, 1) / 2).exp() * normal(TOKENS, hidden // GROUP, GROUP)).flatten(1)
    x = x.to(torch.bfloat16)
    ids = (normal(TOKENS, experts) + normal(experts)).topk(top_k).indices.to(torch.int32)
    ids[1::3, 0] = -1  # another rank's
    ids[:, -1] = experts - 1  # as a shared one, which every token has
    router = normal(TOKENS, top_k).sigmoid()
    plan = Plan(peer.name, alignment, rows_for(TOKENS, top_k, experts, alignment))
    call = (x, w13, w2, router, ids, w13_scale, w2_scale)
    with forced(default_config(TOKENS * top_k, experts, 1)):
        own = fused_moe(*call, True).float()
    got = fused_moe_by_peer(plan, *call).float()
    return float(((got - own).norm(dim=1) / own.norm(dim=1)).max())
