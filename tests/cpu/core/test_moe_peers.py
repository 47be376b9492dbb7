"""For which experts an engine's grouped product is tried at a start: those that the layers will hold."""

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch

from qwen3next_plugin import moe_peers
from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.moe import peer_trial
from qwen3next_plugin.kernels.moe.peers import OFFERS, ExpertShape
from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_integer import integer_layers
from qwen3next_plugin.layers_moe import SparseMoE
from tests.kernels.moe_peer_case import FakeDeepGemm, empty_registry, rule

from .parallel import layers
from .test_sparse_moe import spec_with


@pytest.fixture(autouse=True)
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(peer_trial, "TOKENS", 12)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch, "device", lambda *_: "cpu")
    with empty_registry(rule()):
        yield


def wide(spec: Qwen3NextSpec) -> Qwen3NextSpec:
    return replace(spec, hidden_size=256)


@pytest.mark.parametrize(
    ("lent", "shared", "expected"),
    [
        (layers(0, 1), 256, ExpertShape(5, 256, 256)),
        (layers(1, 2), 256, ExpertShape(5, 256, 128)),
        (layers(0, 1), 512, ExpertShape(4, 256, 256)),  # the shared one cannot join
        (layers(1, 2, expert_parallel=True), 256, ExpertShape(2, 256, 256)),
        (layers(0, 1, None), 256, None),
    ],
)
def test_the_shape_is_that_of_the_layers(lent: ParallelLayers, shared: int, expected: ExpertShape | None) -> None:
    spec = wide(spec_with(256, shared))
    found = moe_peers.expert_shape(spec, lent)
    assert found == expected
    if found is not None:
        held = SparseMoE(spec, lent, "model.layers.0.mlp").get_parameter("experts.w13")
        assert list(held.shape) == [found.experts, 2 * found.inner, found.hidden]


def test_what_is_not_in_blocks_is_not_tried() -> None:
    fake, spec = FakeDeepGemm(), wide(spec_with(128, 128))
    plain = integer_layers(layers(0, 1, None), spec)
    for lent, dtype in ((plain, torch.bfloat16), (layers(0, 1), torch.float16)):
        OFFERS.offer(fake.peer())
        moe_peers.try_grouped_products(spec, lent, dtype)
        assert OFFERS.missing == {"deepgemm": "it takes bfloat16 tokens and experts in FP8 blocks"} and not fake.rows
    OFFERS.prefer("deepgemm")
    with pytest.raises(SettingsError, match="QWEN3NEXT_MOE_PREFILL: .*it cannot be had: it takes bfloat16 tokens and"):
        moe_peers.try_grouped_products(spec, plain, torch.bfloat16)
