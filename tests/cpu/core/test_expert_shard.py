"""Experts over ranks: what the ranks hold adds up to the whole model's experts, under tensor and expert parallelism."""

import dataclasses

import pytest
import torch

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.kernels.gemm import quantize_block
from qwen3next_plugin.kernels.moe.reference import fused_moe
from qwen3next_plugin.layers_moe import Experts
from qwen3next_plugin.spec import Qwen3NextSpec
from qwen3next_plugin.weights import Placement
from tests.configs import new_form

W13, W2 = "model.layers.0.mlp.experts.w13", "model.layers.0.mlp.experts.w2"


@pytest.fixture
def spec() -> Qwen3NextSpec:
    spec = parse_config(new_form())
    return dataclasses.replace(spec, moe=dataclasses.replace(spec.moe, num_experts=8, top_k=3, intermediate_size=24))


def load(shard: ExpertShard, w13: torch.Tensor, w2: torch.Tensor, stacked: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """This rank's w13 and w2, filled from the whole ones as a checkpoint hands them over; poisoned before."""
    hidden, rows = w13.shape[2], shard.intermediate_size
    mine13 = torch.full((shard.num_experts, 2 * rows, hidden), float("nan"), dtype=w13.dtype)
    mine2 = torch.full((shard.num_experts, hidden, rows), float("nan"), dtype=w2.dtype)
    if stacked:
        shard.place(mine13, w13, Placement(W13))
        shard.place(mine2, w2, Placement(W2))
        return mine13, mine2
    for expert in range(w13.shape[0]):
        gate, up = w13[expert].chunk(2)
        shard.place(mine13, gate, Placement(W13, "gate", expert))
        shard.place(mine13, up, Placement(W13, "up", expert))
        shard.place(mine2, w2[expert], Placement(W2, None, expert))
    return mine13, mine2


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_ranks_add_up(spec: Qwen3NextSpec, size: int, expert_parallel: bool, stacked: bool) -> None:
    moe, hidden = spec.moe, 16
    w13 = torch.randn(moe.num_experts, 2 * moe.intermediate_size, hidden, dtype=torch.float64)
    w2 = torch.randn(moe.num_experts, hidden, moe.intermediate_size, dtype=torch.float64)
    x = torch.randn(11, hidden, dtype=torch.float64)
    ids = torch.stack([torch.randperm(moe.num_experts)[: moe.top_k] for _ in range(11)]).int()
    weights = torch.rand(11, moe.top_k, dtype=torch.float64)
    whole = fused_moe(x, w13, w2, weights, ids, None, None)
    total = torch.zeros_like(whole)
    for rank in range(size):
        shard = ExpertShard(spec, rank, size, expert_parallel)
        mine13, mine2 = load(shard, w13, w2, stacked)
        total += fused_moe(x, mine13, mine2, weights, shard.local_ids(ids), None, None)
    torch.testing.assert_close(total, whole, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize(("intermediate", "size"), [(512, 8), (384, 2), (256, 2)])
def test_fp8_ranks_add_up(intermediate: int, size: int, expert_parallel: bool, stacked: bool) -> None:
    """Blocks of 128 that a slice of 64 or 192 cuts in the middle: codes and factors land, and mean what they meant."""
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    spec = parse_config(new_form(quantization_config=quant))
    spec = dataclasses.replace(
        spec, moe=dataclasses.replace(spec.moe, num_experts=8, top_k=3, intermediate_size=intermediate)
    )
    hidden, experts = 136, spec.moe.num_experts
    whole13, scale13 = quantize_block(torch.randn(experts, 2 * intermediate, hidden))
    whole2, scale2 = quantize_block(torch.randn(experts, hidden, intermediate))
    x = torch.randn(5, hidden, dtype=torch.float64)
    ids = torch.stack([torch.randperm(experts)[:3] for _ in range(5)]).int()
    weights = torch.rand(5, 3, dtype=torch.float64)
    expected = fused_moe(x, whole13, whole2, weights, ids, scale13, scale2)
    total = torch.zeros_like(expected)
    for rank in range(size):
        experts_of_rank = Experts(ExpertShard(dataclasses.replace(spec, hidden_size=hidden), rank, size,
                                                    expert_parallel), 128)  # fmt: skip
        for name, tensor in (("w13", whole13), ("w2", whole2), ("w13_scale_inv", scale13), ("w2_scale_inv", scale2)):
            parameter = getattr(experts_of_rank, name)
            parameter.data.view(torch.uint8).fill_(0x7F)  # NaN as codes, huge as factors
            placed = f"model.layers.0.mlp.experts.{name}"
            if stacked:
                parameter.weight_loader(parameter, tensor, Placement(placed))
                continue
            for expert in range(experts):
                parts = tensor[expert].chunk(2) if name.startswith("w13") else (tensor[expert],)
                for part, shard in zip(parts, ("gate", "up") if len(parts) == 2 else (None,), strict=True):
                    parameter.weight_loader(parameter, part, Placement(placed, shard, expert))
        local = experts_of_rank.shard.local_ids(ids)
        mine = (experts_of_rank.w13, experts_of_rank.w2, weights, local)
        total += fused_moe(x, *mine, experts_of_rank.w13_scale_inv, experts_of_rank.w2_scale_inv)
    torch.testing.assert_close(total, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("size", "expert_parallel", "field"), [(5, False, "moe_intermediate_size"), (3, True, "num_experts")]
)
def test_a_size_that_does_not_divide_is_refused(
    spec: Qwen3NextSpec, size: int, expert_parallel: bool, field: str
) -> None:
    with pytest.raises(WeightError, match=field):
        ExpertShard(spec, 0, size, expert_parallel)
