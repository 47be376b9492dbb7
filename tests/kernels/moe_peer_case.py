"""A grouped product in torch behind DeepGEMM's calling convention, and a registry of offers for a test."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from qwen3next_plugin.kernels import offers
from qwen3next_plugin.kernels.gemm.reference import dequantize_block, dequantize_tokens
from qwen3next_plugin.kernels.moe import peer_table, peers
from qwen3next_plugin.kernels.moe.peer_trial import trial
from qwen3next_plugin.kernels.moe.peers import ExpertShape, Peer, PeerCall, Plan, rows_for
from qwen3next_plugin.kernels.moe.triton.by_peer import fused_moe_by_peer
from tests.helpers import nan_like

CPU = (0, 0)
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SHAPE = ExpertShape(4, 256, 128)


class FakeDeepGemm:
    """`m_grouped_fp8_gemm_nt_contiguous` as it is on compute capability 9.0 with ``use_psum_layout``, which is told
    where each expert's rows end: refuses what DeepGEMM's checks refuse, and leaves NaN in rows that no expert has.

    spoiled: what it does wrongly, one of "factors", "experts" and "order".
    """

    def __init__(self, spoiled: str = "") -> None:
        self.alignment = 128
        self.spoiled = spoiled
        self.rows: list[int] = []  # of each call

    @contextmanager
    def aligned(self, alignment: int) -> Iterator[None]:
        """As the engines' scopes: DeepGEMM's tiles are that high inside."""
        before, self.alignment = self.alignment, alignment
        yield
        self.alignment = before

    def __call__(
        self,
        a: tuple[Tensor, Tensor],
        b: tuple[Tensor, Tensor],
        d: Tensor,
        grouped_layout: Tensor,
        *,
        use_psum_layout: bool = False,
        disable_ue8m0_cast: bool = False,
    ) -> None:
        (rows, factors), (weight, weight_factors) = a, b
        count, columns = rows.shape
        experts, outputs, _ = weight.shape
        self.rows.append(count)
        assert rows.dtype is weight.dtype is torch.float8_e4m3fn and rows.is_contiguous() and weight.is_contiguous()
        assert factors.dtype is weight_factors.dtype is torch.float32 and count % 4 == 0
        assert factors.shape == (count, columns // 128) and factors.T.is_contiguous(), "it would be copied"
        assert weight_factors.shape == (experts, outputs // 128, columns // 128) and weight_factors.is_contiguous()
        assert d.shape == (count, outputs) and d.dtype is torch.bfloat16 and d.is_contiguous()
        assert use_psum_layout and grouped_layout.shape == (experts,) and grouped_layout.dtype is torch.int32
        assert columns % 128 == 0 and outputs % 8 == 0 and count % self.alignment == 0
        if self.spoiled == "factors":
            factors = factors.roll(1, 0)
        if self.spoiled == "experts":
            weight_factors = weight_factors.roll(1, 0)
        d.copy_(nan_like(d))
        start = 0
        for expert, end in enumerate(grouped_layout.tolist()):
            assert start <= end <= count
            values = dequantize_tokens(rows[start:end], factors[start:end], torch.float32)
            held = dequantize_block(weight[expert], weight_factors[expert], torch.float32)
            d[start:end] = (values @ held.T).to(torch.bfloat16)
            start = -(-end // self.alignment) * self.alignment

    def peer(self) -> Peer:
        """As an adapter makes it."""

        def run(call: PeerCall) -> None:
            rows, weight = (call.rows, call.factors), (call.weight, call.weight_factors)
            with self.aligned(call.alignment):
                self(rows, weight, call.out, call.ends, use_psum_layout=True)

        return Peer("deepgemm", run)


@contextmanager
def empty_registry(*rules: peer_table.Rule) -> Iterator[None]:
    """No offers before, none after; the CPU takes the place of a GPU that has these rules."""
    saved: Any = peer_table.RULES, peers.capability_of
    peer_table.RULES, peers.capability_of = rules, lambda device: CPU  # type: ignore[assignment]
    peers.OFFERS.withdraw_all()
    try:
        yield
    finally:
        peer_table.RULES, peers.capability_of = saved
        peers.OFFERS.prefer(offers.AUTO)
        peers.OFFERS.withdraw_all()


def rule(min_tokens: int = 1, alignment: int = 16, peer: str = "deepgemm") -> peer_table.Rule:
    """A rule for the CPU."""
    return peer_table.Rule(CPU, peer, min_tokens, alignment, "")


def check_peer(peer: Peer) -> None:
    """A stand-in behind an adapter agrees with our own kernels."""
    with empty_registry(rule()):
        peers.OFFERS.offer(peer)
        peers.try_offers(SHAPE, DEVICE)
        assert not peers.OFFERS.missing and peers.OFFERS.shapes_of(peer.name) == [SHAPE]


def check_installed(peer: Peer) -> None:
    """What is installed agrees with our own kernels for the published model's experts, whole and of one rank of four;
    in a graph, whose numbers of rows the routing does not change, it gives the bits that it gives outside of one.
    """
    device = torch.device("cuda", torch.cuda.current_device())
    for shape in (ExpertShape(513, 2048, 512), ExpertShape(513, 2048, 128)):
        for alignment in (64, 128):
            assert trial(peer, shape, device, alignment) is None
    with empty_registry():
        peers.OFFERS.offer(peer)
        _check_graph(peer, device)


def _check_graph(peer: Peer, device: torch.device) -> None:
    w13, w2 = (torch.ones(s, device=device).to(torch.float8_e4m3fn) for s in ((8, 512, 1024), (8, 1024, 256)))
    s13, s2 = torch.rand(8, 4, 8, device=device), torch.rand(8, 8, 2, device=device)
    x = torch.randn(300, 1024, device=device, dtype=torch.bfloat16)
    ids, router = torch.zeros(300, 2, dtype=torch.int32, device=device), torch.rand(300, 2, device=device)
    plan = Plan(peer.name, 128, rows_for(300, 2, 8, 128))

    def run() -> Tensor:
        return fused_moe_by_peer(plan, x, w13, w2, router, ids, s13, s2)

    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run()
    for skipped in (0.0, 0.5, 1.0):
        ids.copy_(torch.randint(0, 8, ids.shape, device=device))
        ids[torch.rand(ids.shape, device=device) < skipped] = -1
        graph.replay()
        assert torch.equal(out, run())
        for _ in range(100):
            before = out.clone()
            graph.replay()
            assert torch.equal(out, before)
