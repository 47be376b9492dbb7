"""Estimates of time and resources, and what they leave out."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile
from qwen3next_plugin.tune import space
from qwen3next_plugin.tune.model import asynchronous, config_seconds, fits, product_seconds, registers, shared_memory
from qwen3next_plugin.tune.problem import Problem, problem_of
from qwen3next_plugin.tune.space import EFFORTS, Effort, by_model, candidates, ranked, tiles_of
from tests.cpu.tune.fakes import H200, PUBLISHED

A100, ADA = KNOWN["a100"], KNOWN["rtx-4090"]


@given(tokens=st.integers(1, 60), experts=st.sampled_from([2, 5]), block=st.sampled_from([1, 4, 16]))
def test_the_mean_number_of_tiles_is_the_binomials(tokens: int, experts: int, block: int) -> None:
    problem = Problem(experts, experts, 1, 64, 64, "bf16")
    chance = 1 / experts
    mean = sum(
        math.comb(tokens, n) * chance**n * (1 - chance) ** (tokens - n) * math.ceil(n / block)
        for n in range(tokens + 1)
    )
    assert problem.tiles(tokens, block) == pytest.approx(experts * mean, rel=1e-6)


def test_tiles_of_one_row_are_the_pairs_and_of_many_the_touched_experts() -> None:
    assert PUBLISHED.tiles(3000, 1) == pytest.approx(PUBLISHED.pairs(3000), rel=1e-6)
    assert PUBLISHED.tiles(20, 128) == pytest.approx(PUBLISHED.touched(20), rel=1e-6)
    everyone = Problem(4, 4, 4, 64, 64, "bf16")
    assert everyone.tiles(17, 16) == pytest.approx(8)


@pytest.mark.parametrize("gpu", [H200, A100, ADA])
@pytest.mark.parametrize("mode", ["bf16", "fp8"])
def test_what_cannot_run_is_ruled_out(gpu: space.Gpu, mode: str) -> None:
    problem = Problem(512, 512, 10, 2048, 512, mode)
    for tokens, block_m in itertools.product((1, 4096), space.BLOCK_M):
        for product in problem.products(problem.activation_bytes(tokens, gpu)):
            found = {tile for _, tile in ranked(gpu, problem, product, tokens, block_m)}
            for tile in tiles_of(product):
                allowed = (
                    shared_memory(gpu, product, block_m, tile) <= gpu.shared_memory
                    and registers(gpu, product, block_m, tile) <= 264
                    and (product.scale_depth is None or tile.block_k <= product.scale_depth)
                    and not (asynchronous(gpu, block_m, tile) and tile.block_n < 64)
                )
                assert allowed == fits(gpu, product, block_m, tile) == (tile in found)
            assert found


def test_a_tile_is_never_wider_or_deeper_than_the_product() -> None:
    gate_up, down = Problem(512, 512, 10, 2048, 64, "bf16").products(2)
    assert max(tile.block_n for tile in tiles_of(gate_up)) == 64
    assert max(tile.block_k for tile in tiles_of(down)) == 64


def test_no_estimate_beats_the_memory_or_the_tensor_cores() -> None:
    for gpu, mode, tokens in itertools.product((H200, A100, ADA), ("bf16", "fp8"), (1, 64, 8192)):
        problem = Problem(512, 512, 10, 2048, 512, mode)
        config = by_model(gpu, problem, tokens)
        assert config is not None
        read = problem.touched(tokens) * 3 * 2048 * 512 * problem.weight_bytes
        flop = 2 * problem.pairs(tokens) * 3 * 2048 * 512
        peak = (gpu.fp8 or gpu.bf16) if problem.activation_bytes(tokens, gpu) == 1 else gpu.bf16
        floor = max(read / gpu.bandwidth / 1e9, flop / peak / 1e12)
        assert floor < config_seconds(gpu, problem, tokens, config) < 6 * floor


def small_space(monkeypatch: pytest.MonkeyPatch) -> None:
    candidates.cache_clear()
    monkeypatch.setattr(space, "BLOCK_M", (16, 64))
    monkeypatch.setattr(space, "BLOCK_N", (32, 64, 128))
    monkeypatch.setattr(space, "BLOCK_K", (64, 128))
    monkeypatch.setattr(space, "NUM_WARPS", (4, 8))
    monkeypatch.setattr(space, "NUM_STAGES", (2, 4))


def exhaustive(problem: Problem) -> list[MoeConfig]:
    gate_up, down = problem.products(2)
    every = itertools.product(space.BLOCK_M, tiles_of(gate_up), tiles_of(down))
    return [MoeConfig(block_m, first, second) for block_m, first, second in every]


@given(
    slug=st.sampled_from(sorted(KNOWN)),
    tokens=st.sampled_from([1, 3, 17, 64, 300, 2048]),
    inner=st.sampled_from([64, 128, 512]),
    mode=st.sampled_from(["bf16", "fp8"]),
)
def test_pruning_keeps_the_best_of_all(slug: str, tokens: int, inner: int, mode: str) -> None:
    gpu, problem = KNOWN[slug], Problem(512, 512, 10, 2048, inner, mode)
    with pytest.MonkeyPatch.context() as patch:
        small_space(patch)
        best = min(config_seconds(gpu, problem, tokens, config) for config in exhaustive(problem))
        for effort in (Effort(1.0, 1000, 1000), *EFFORTS.values()):
            kept = candidates(gpu, problem, tokens, effort)
            configs = [
                MoeConfig(found.block_m, first, second)
                for found in kept
                for first, second in itertools.product(found.gate_up, found.down)
            ]
            shortest = min(config_seconds(gpu, problem, tokens, config) for config in configs)
            # a cut list may end within what the estimates can tell apart
            assert shortest <= best * (1 + 1e-9 if effort.tiles == 1000 else 1.08)
    candidates.cache_clear()


@given(data=st.data(), tokens=st.sampled_from([1, 64, 2048]))
def test_pruning_keeps_the_best_of_all_however_wrong_the_estimates_within_the_slack(
    data: st.DataObject, tokens: int
) -> None:
    """Each product's time off by a factor of up to 2**0.49: slack 2 keeps what is then the best tile."""
    wrong = 2**0.49
    for product in PUBLISHED.products(2):
        found = ranked(H200, PUBLISHED, product, tokens, 16)
        seed = data.draw(st.randoms(use_true_random=False))
        true = {tile: seconds * seed.uniform(1 / wrong, wrong) for seconds, tile in found}
        best = min(true, key=lambda tile: true[tile])
        shortest = min(seconds for seconds, _ in found)
        assert product_seconds(H200, PUBLISHED, product, tokens, 16, best) <= 2.0 * shortest


def test_efforts_are_what_they_say() -> None:
    counts = [sum(f.count for f in candidates(H200, PUBLISHED, 64, EFFORTS[name])) for name in EFFORTS]
    assert counts == sorted(counts) and counts[0] <= 5 and 18 <= counts[1] <= 22 and counts[2] <= 4 * 79


@pytest.mark.parametrize(("inner", "depth"), [(512, 128), (64, 64), (128, 128)])
def test_a_factor_covers_what_the_shard_leaves_of_its_block(inner: int, depth: int) -> None:
    problem = Problem(512, 512, 10, 2048, inner, "fp8")
    assert [product.scale_depth for product in problem.products(2)] == [128, depth]
    config = by_model(H200, problem, 64)
    assert config is not None and config.down.block_k <= depth


def test_activations_are_rounded_where_the_operation_rounds_them() -> None:
    bf16 = Problem(512, 512, 10, 2048, 512, "bf16")
    assert [PUBLISHED.activation_bytes(n, H200) for n in (1, 4, 5, 8192)] == [2, 2, 1, 1]
    assert PUBLISHED.activation_bytes(8192, A100) == bf16.activation_bytes(8192, H200) == 2
    assert Problem(64, 512, 10, 2048, 512, "fp8").activation_bytes(5, H200) == 1


def test_problems_of_ranks() -> None:
    from qwen3next_plugin.config import parse_config
    from qwen3next_plugin.demo.shapes import config_of
    from qwen3next_plugin.errors import PluginError

    spec = parse_config(config_of("80b"))
    assert problem_of(spec, 4, 1, "fp8") == Problem(512, 512, 10, 2048, 128, "fp8")
    assert problem_of(spec, 1, 8, "bf16") == Problem(64, 512, 10, 2048, 512, "bf16")
    wrong = ((2, 2, "fp8", "one way only"), (3, 1, "fp8", "size 3 does not divide"), (1, 1, "int4", "--dtype: 'int4'"))
    for tp, ep, mode, words in wrong:
        with pytest.raises(PluginError, match=words):
            problem_of(spec, tp, ep, mode)


def test_a_wider_row_segment_and_more_stages_are_never_estimated_to_fit_more() -> None:
    gate_up, _ = PUBLISHED.products(2)
    for gpu, block_m in itertools.product((H200, ADA), space.BLOCK_M):
        taken = [shared_memory(gpu, gate_up, block_m, Tile(64, 64, 4, stages)) for stages in range(2, 7)]
        assert taken == sorted(taken)
