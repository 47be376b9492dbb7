"""What is compiled before a server is ready covers what its steps launch, and nothing of the model changes."""

import json
import logging
from pathlib import Path
from typing import Any
from unittest.mock import Mock, call

import pytest
import torch

from qwen3next_plugin import warmup
from qwen3next_plugin.kernels import compilations
from qwen3next_plugin.kernels.gemm import quantize_block
from qwen3next_plugin.kernels.moe import config, ways
from tests.helpers import output_of

LAYERS = ("gdn", "gdn varied", "attention", "dense")
EXPERTS = (
    *("bf16", "fp8", "fp8 apart", "fp8 slices", "fp8 by peer", "fp8 tall"),
    *("int4", "int8", "int8 activations"),
)


@pytest.mark.parametrize("kind", LAYERS + EXPERTS)
def test_no_step_launches_what_was_not_warmed(kind: str) -> None:
    """By Triton's own word for what it would compile anew; see served_kernels.py for the numbers of tokens tried."""
    found = json.loads(output_of("tests.cpu.core.served_kernels", "90", kind)[-1])
    assert found["warm"] >= 10
    assert found["cold"] == [], "\n".join(found["cold"])


def fp8_weights(experts: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    halves, scale = quantize_block(torch.randn(experts, 2, 128, 128))
    return halves.flatten(1, 2), scale.flatten(1, 2)


def test_every_way_of_the_table_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    w13, scale = fp8_weights()
    found = ways.ways_up_to(ways.MANY_PAIRS, 2, 2, w13, scale)
    assert min(limits[0] for way, limits in found.items() if way.quantize) == ways.MAX_TOKENS + 1
    assert [limits for way, limits in found.items() if not way.quantize] == [(1, ways.MAX_TOKENS)]
    assert min(limits[0] for way, limits in found.items() if way.chunks) == ways.MANY_PAIRS // 2
    heights = {way.config.block_m for way in found if way.config is not None}
    assert heights == {16, 32, 64, 128}
    assert {way.scan for way in found} == {0, ways.SHORT_SCAN, ways.LONG_SCAN}
    assert not any(way.apart for way in found), "four experts have fewer tiles than pairs"
    kept = ways.ways_up_to(ways.MANY_PAIRS, 2, 2, w13, scale, quantize_activations=False)
    assert not any(way.quantize for way in kept)


def test_both_ways_of_a_short_scan_are_found_and_met(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pairs that need no sorting, and as many or more that do: the warm-up's tokens go the way they stand for."""
    monkeypatch.setattr(ways, "has_fp8_units", lambda device: True)
    w13, scale = fp8_weights(64)
    found = ways.ways_up_to(300, 3, 2, w13, scale)
    short = {way: limits for way, limits in found.items() if way.scan == ways.SHORT_SCAN}
    assert [(way.apart, limits) for way, limits in short.items()] == [(True, (17, 22)), (False, (23, 85))]
    for way in found:
        tokens = warmup._fewest_tokens(way, 3, 64)
        if way.config is None:
            continue
        with config.forced(way.config):
            assert ways.choose_way(tokens, 3, 2, w13, scale, way.quantize, 0) == way


def test_every_way_of_a_file_is_found(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Also one that comes, goes and comes again, and the one beyond the largest number of tokens."""
    tile = config.Tile(32, 32, 4, 2)
    one, other, far = (config.MoeConfig(rows, tile, tile) for rows in (16, 32, 64))
    places = ((20, one), (40, other), (80, one), (160, far), (640, other))
    entries = tuple(config.Entry(tokens, 2, held) for tokens, held in places)

    def choose(tokens: int, top_k: int, w13: torch.Tensor, activation_bytes: int) -> Any:
        return config.nearest(entries, tokens, activation_bytes)

    monkeypatch.setattr(ways, "choose_config", choose)
    found = ways.ways_up_to(130, 1, 2, torch.empty(4, 32, 16))
    assert [(way.config, limits) for way, limits in found.items()] == [
        (None, (1, ways.MAX_TOKENS)),
        (one, (ways.MAX_TOKENS + 1, 113)),
        (other, (29, 56)),
        (far, (114, 130)),
    ]


def test_the_end_of_a_start_is_told_of_too(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """What the engine's own start compiled after the warm-up shows what the warm-up has missed."""
    late = (compilations.Compilation("_early", ""), compilations.Compilation("_late", "x:*bf16"))
    monkeypatch.setattr(compilations, "compiled", lambda: late)
    monkeypatch.setattr(compilations, "serve", served := Mock())
    logger = logging.getLogger("a server's")
    warmup.serve(logger, warmup.WarmUp(layers=0, compiled=0, seconds=0.0, known=0))
    assert not served.called and not caplog.messages
    warmup.serve(logger, warmup.WarmUp(layers=3, compiled=2, seconds=0.5, known=2))
    assert not caplog.messages
    warmup.serve(logger, warmup.WarmUp(layers=3, compiled=1, seconds=0.5, known=1))
    (message,) = caplog.messages
    assert "while the server started: _late." in message
    assert served.call_args_list == 2 * [call(logger.warning)]
