"""The mixture of experts on one rank: routed experts alone, and with the shared expert as one more of them.

The plugin runs the second; an engine that keeps the shared expert apart is compared with the first. Routing is in
neither. Weights are `qwen3next tune moe`'s. Where an engine's grouped product was tried, further series run it with
tiles of either height, and where the plugin would choose it, the plugin's own kernels.
"""

import math
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels import moe
from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe import peer_table, reference
from qwen3next_plugin.kernels.moe.config import config_object
from qwen3next_plugin.kernels.moe.peer_deepgemm import NAME
from qwen3next_plugin.kernels.moe.peers import OFFERS, ExpertShape, Plan, rows_for, try_offers
from qwen3next_plugin.kernels.moe.ways import Way, choose_way, rounds
from qwen3next_plugin.kernels.offers import OWN
from qwen3next_plugin.tune.cuda import CudaMachine, layers_that_fit
from qwen3next_plugin.tune.problem import Problem, problem_of
from qwen3next_plugin.weights_layout import FP8_BLOCK

from .bounds import BY_PEER
from .cases import Case
from .peers import named
from .work import Engine, Normal, Prepared, Work, copies_of, is_rehearsal

ROUTED, JOINED = "routed", "joined"
_CHECKED = 64
_LAYERS = 4
_MOST_CALLS = 32


@dataclass
class MoeInputs:
    """x [T, H], and of all experts, the shared one last: w13, w2 and their factors; weights and ids [T, top_k + 1]."""

    x: Tensor
    w13: Tensor
    w2: Tensor
    s13: Tensor | None
    s2: Tensor | None
    weights: Tensor
    ids: Tensor

    def arguments(self, does: str) -> tuple[Any, ...]:
        """x, w13, w2, weights, ids and factors, with the shared expert or without."""
        if does == JOINED:
            return (self.x, self.w13, self.w2, self.weights, self.ids, self.s13, self.s2)
        tensors = (self.w13, self.w2, self.s13, self.s2)
        w13, w2, s13, s2 = (None if tensor is None else tensor[:-1] for tensor in tensors)
        return (self.x, w13, w2, self.weights[:, :-1].contiguous(), self.ids[:, :-1].contiguous(), s13, s2)


class MoeBuilder:
    """Makes works; weights stay for the next case that has the same."""

    def __init__(self, spec: Qwen3NextSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        self._machine: CudaMachine | None = None

    def _weights(self, routed: Problem) -> list[tuple[Any, ...]]:
        joined = replace(routed, experts=routed.experts + 1, total_experts=routed.total_experts + 1)
        if self._machine is None or self._machine.problem != joined:
            self._machine = None  # gone before the next ones come
            count = 1
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                count = 1 if is_rehearsal() else layers_that_fit(joined)
            self._machine = CudaMachine(joined, KNOWN["h200"], min(count, _LAYERS), self.device)
        return self._machine.layers

    def __call__(self, case: Case, spec: Qwen3NextSpec, engine: Engine, device: torch.device) -> Work:
        """The work of a case."""
        routed = problem_of(spec, case.ranks, 1, case.variant)
        layers, normal = self._weights(routed), Normal(device)
        tokens, hidden, top_k = case.tokens, routed.hidden, routed.top_k
        expert = 3 * hidden * routed.inner * routed.weight_bytes
        gate = normal(1, hidden, scale=hidden**-0.5)
        moved_each = int(routed.touched(tokens) * expert) + 4 * tokens * hidden
        count = max(len(layers), min(_MOST_CALLS, copies_of(moved_each, 5 * tokens * hidden, device)))
        copies = []
        for n in range(count):
            w13, w2, s13, s2 = layers[n % len(layers)]
            x = normal(tokens, hidden)
            logits = normal(tokens, routed.total_experts, dtype=torch.float32)
            weights, ids = moe.route(logits, top_k, True, x, gate)
            copies.append(MoeInputs(x, w13, w2, s13, s2, weights, ids))
        _offer(engine, case, copies[0])
        own = {
            name: Prepared([partial(_run, one.arguments(does), does) for one in copies], does)
            for name, does in (("own", ROUTED), ("plugin", JOINED))
        }
        own |= _by_peer(copies)
        pairs = tokens * (top_k + 1)
        touched = [len(one.ids.unique()) for one in copies]
        return Work(
            case=case,
            text=f"routed experts ({routed.experts}, top {top_k}) and, joined, the shared one "
            f"({routed.experts + 1}, top {top_k + 1}); no routing; inner width {routed.inner}",
            bytes=int(sum(touched) / count * expert) + 4 * tokens * hidden,
            flops=pairs * 6 * hidden * routed.inner,
            products="fp8" if case.variant == "fp8" and _rounds(copies[0], JOINED) else "bf16",
            inputs=copies,
            own=own,
            expected={does: partial(_expected, copies[0], does) for does in (ROUTED, JOINED)},
            subset=lambda out: out[_checked(out.shape[0], out.device)],
            share_of="plugin",
            facts=_facts(copies[0], pairs * 6 * hidden * routed.inner, 6 * hidden * routed.inner),
        )


def _rounds(one: MoeInputs, does: str) -> bool:
    x, w13, _, _, _, s13, _ = one.arguments(does)
    return rounds(x.shape[0], w13, s13)


def _run(arguments: tuple[Any, ...], does: str) -> Tensor:
    return moe.fused_moe(*arguments, num_shared=int(does == JOINED))


def _run_own(arguments: tuple[Any, ...], does: str) -> Tensor:
    with OFFERS.preferring(OWN):
        return _run(arguments, does)


def _offer(engine: Engine, case: Case, one: MoeInputs) -> None:
    """Has the engine's grouped product tried, as at its start, where it takes these weights."""
    shape = _shape(one)
    if not one.x.is_cuda or one.s13 is None or case.tokens < peer_table.MIN_TOKENS or shape.inner % FP8_BLOCK:
        return
    if shape not in OFFERS.shapes_of(NAME) and NAME not in OFFERS.missing:
        adapter = f"qwen3next_plugin.{engine}_integration.moe_peers"
        if NAME not in OFFERS.found:
            OFFERS.look_for(NAME, named(f"{adapter}:load_deepgemm"), f"not in this {engine}")
        # By name, so that it is compared where the table does not choose it, too. What is missing is among the facts.
        with OFFERS.preferring(NAME), suppress(ValueError):
            try_offers(shape, one.x.device)


def _shape(one: MoeInputs) -> ExpertShape:
    return ExpertShape(one.w13.shape[0], one.x.shape[1], one.w2.shape[2])


def _by_peer(copies: list[MoeInputs]) -> dict[str, Prepared]:
    """Series of the grouped product and, where the plugin runs it, of what it would run without."""
    (tokens, choices), shape = copies[0].ids.shape, _shape(copies[0])
    found: dict[str, Prepared] = {}
    if copies[0].s13 is None or tokens < peer_table.MIN_TOKENS or shape not in OFFERS.shapes_of(NAME):
        return found
    from qwen3next_plugin.kernels.moe.triton.by_peer import fused_moe_by_peer

    for name, alignment in BY_PEER.items():
        plan = Plan(NAME, alignment, rows_for(tokens, choices, shape.experts, alignment))
        found[name] = Prepared([partial(fused_moe_by_peer, plan, *one.arguments(JOINED)) for one in copies], JOINED)
    if _way(copies[0]).plan is not None:
        found["kernels"] = Prepared([partial(_run_own, one.arguments(JOINED), JOINED) for one in copies], JOINED)
    return found


def _way(one: MoeInputs) -> Way:
    """How our kernels go through all experts."""
    return choose_way(
        *(one.x.shape[0], one.ids.shape[1], one.x.element_size(), one.w13, one.s13, _rounds(one, JOINED)), num_shared=1
    )


def _checked(tokens: int, device: torch.device) -> Tensor:
    return torch.linspace(0, tokens - 1, min(tokens, _CHECKED), device=device).long()


def _expected(one: MoeInputs, does: str) -> Tensor:
    x, w13, w2, weights, ids, s13, s2 = one.arguments(does)
    rows = _checked(x.shape[0], x.device)
    if s13 is None:
        w13, w2 = w13.float(), w2.float()
    rounded = _rounds(one, does)
    return reference.fused_moe(x[rows].float(), w13, w2, weights[rows], ids[rows], s13, s2, rounded)


def _facts(one: MoeInputs, useful: int, pair: int) -> dict[str, Any]:
    """What our kernels do with it: the tiles, and the products that padding adds."""
    facts: dict[str, Any] = {"useful_flops": useful, "experts_touched": len(one.ids.unique())}
    if OFFERS.missing:
        facts["missing"] = dict(OFFERS.missing)
    way = _way(one)
    if way.plan is not None:
        height, config = way.plan.alignment, way.plan._asdict()
    elif way.config is not None:
        height, config = way.config.block_m, config_object(way.config) | ({"tall": True} if way.tall else {})
    else:
        return facts | {"padded_flops": useful, "config": "whole rows: no tiles"}
    rows = torch.bincount(one.ids.flatten(), minlength=one.w13.shape[0]).tolist()
    padded = sum(math.ceil(count / height) * height for count in rows)
    return facts | {"padded_flops": padded * pair, "config": config}
