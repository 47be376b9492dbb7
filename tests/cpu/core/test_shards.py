"""Tensor-parallel slices: put together they are the whole, and a sliced layer computes its share of the whole layer."""

from math import gcd
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.kernels.gemm import dequantize_block
from qwen3next_plugin.weights import (
    Placement,
    check_tensor_parallel,
    fuse_checkpoint,
    fused_stream,
    shard_fused,
)
from tests.cpu.core.checkpoints import dequantised, fp8_checkpoint, fp8_spec, random_checkpoint, small_spec

SIZES = st.sampled_from([1, 2, 4])


@st.composite
def specs(draw: st.DrawFn) -> Qwen3NextSpec:
    """Models that 1, 2 and 4 ranks can share, KV heads from one (replicated) to eight."""
    kv_heads = draw(st.sampled_from([1, 2, 4, 8]))
    return small_spec(
        num_key_value_heads=kv_heads,
        num_attention_heads=max(4, kv_heads) * draw(st.sampled_from([1, 2])),
        linear_num_key_heads=4,
        linear_num_value_heads=4 * draw(st.sampled_from([1, 2, 4])),
        mlp_only_layers=draw(st.sampled_from([[], [1]])),
        num_experts=2,
    )


@given(specs(), SIZES)
def test_slices_put_together_are_the_whole(spec: Qwen3NextSpec, size: int) -> None:
    check_tensor_parallel(spec, size)
    fused = fuse_checkpoint(random_checkpoint(spec).items(), spec)
    for name, whole in fused.items():
        slices = [shard_fused(name, whole, spec, rank, size) for rank in range(size)]
        if all(part.shape == whole.shape for part in slices):
            assert all(torch.equal(part, whole) for part in slices), name
            continue
        dim = next(d for d in range(whole.dim()) if slices[0].shape[d] != whole.shape[d])
        restored = torch.full_like(whole, float("nan"))
        # Row numbers sliced like the weight say where each row of a slice belongs.
        numbers = torch.arange(whole.shape[dim]).view([-1 if d == dim else 1 for d in range(whole.dim())])
        numbers = numbers.expand(whole.shape).contiguous()
        for rank, part in enumerate(slices):
            places = shard_fused(name, numbers, spec, rank, size).movedim(dim, -1)
            places = places.reshape(-1, places.shape[-1])[0]
            restored.index_copy_(dim, places, part)
        assert torch.equal(restored, whole), name
        replicated = size > spec.attention.num_kv_heads and "qkv_proj" in name
        if not replicated:
            assert sum(part.shape[dim] for part in slices) == whole.shape[dim], name


def test_replicated_and_sliced_tensors_are_the_ones_engines_expect() -> None:
    spec = small_spec(mlp_only_layers=[1])
    fused = fuse_checkpoint(random_checkpoint(spec).items(), spec)
    replicated = {n for n, w in fused.items() if shard_fused(n, w, spec, 1, 2).shape == w.shape}
    layers = [n for n in fused if n not in replicated]
    assert all("norm" in n or "gate.weight" in n or n == "mtp.fc.weight" for n in replicated), replicated
    assert not any("norm" in n for n in layers)


def test_q_k_v_z_are_each_cut_by_heads() -> None:
    spec = small_spec()
    gdn = spec.gdn
    rows = torch.arange(2 * gdn.key_dim + 2 * gdn.value_dim)[:, None]
    q, k, v, z = rows.split([gdn.key_dim, gdn.key_dim, gdn.value_dim, gdn.value_dim])
    expected = torch.cat([part.chunk(2)[1] for part in (q, k, v, z)])
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    assert torch.equal(shard_fused(name, rows, spec, 1, 2), expected)
    conv = rows[: gdn.conv_dim]
    expected = torch.cat([part.chunk(2)[0] for part in (q, k, v)])
    assert torch.equal(shard_fused("model.layers.0.linear_attn.conv1d.weight", conv, spec, 0, 2), expected)


@pytest.mark.parametrize(("size", "expected"), [(1, [[0, 1]]), (2, [[0], [1]]), (4, [[0], [0], [1], [1]])])
def test_kv_heads_are_shared_among_ranks_that_use_them(size: int, expected: list[list[int]]) -> None:
    spec = small_spec(num_attention_heads=4, num_key_value_heads=2)
    heads = torch.arange(2).repeat_interleave(spec.attention.head_dim)[:, None]
    place = Placement("mtp.layers.0.self_attn.qkv_proj.weight", "k")
    found = [shard_fused(place, heads, spec, rank, size).unique().tolist() for rank in range(size)]
    assert found == expected


@given(specs(), SIZES)
def test_parts_are_cut_like_the_tensor_they_make(spec: Qwen3NextSpec, size: int) -> None:
    tensors = random_checkpoint(spec)
    fused = fuse_checkpoint(tensors.items(), spec)
    for name, tensor, placement in fused_stream(tensors.items(), spec):
        if placement.shard is None or placement.expert not in (None, 1):
            continue
        rank = size - 1
        part = shard_fused(placement, tensor, spec, rank, size)
        whole = shard_fused(name, fused[name], spec, rank, size)
        whole = whole if placement.expert is None else whole[placement.expert]
        if placement.shard in ("q", "gate"):
            assert torch.equal(part, whole[: part.shape[0]]), name
        elif placement.shard in ("v", "up"):
            assert torch.equal(part, whole[-part.shape[0] :]), name


@pytest.mark.parametrize("size", [1, 2])
def test_fp8_scales_are_cut_with_their_weight(size: int) -> None:
    spec = fp8_spec(block=16, shared_expert_intermediate_size=64)
    fused = fuse_checkpoint(fp8_checkpoint(spec).items(), spec)
    checked = 0
    for name, weight in fused.items():
        scale_name = name + "_scale_inv"
        if scale_name not in fused:
            continue
        whole = dequantised(weight, fused[scale_name], 16)
        for rank in range(size):
            part = shard_fused(name, weight, spec, rank, size)
            scale = shard_fused(scale_name, fused[scale_name], spec, rank, size)
            assert part.dtype is torch.float8_e4m3fn
            assert torch.equal(dequantised(part, scale, 16), shard_fused(name, whole, spec, rank, size)), name
            checked += 1
    assert checked > 20 * size


@pytest.mark.parametrize(("width", "size"), [(512, 8), (384, 2), (192, 2), (128, 4)])
def test_a_cut_through_an_fp8_block_keeps_every_value(width: int, size: int) -> None:
    """512 over eight ranks leaves them 64, half a block; 384 over two 192, which blocks of 128 cannot tile from 192."""
    spec = fp8_spec(block=128, moe_intermediate_size=width)
    for name, shape, dim in (("w13", (3, 2 * width, 64), -2), ("w2", (3, 64, width), -1)):
        if name == "w13" and width % 128:
            continue  # gate and up share a block there, which no checkpoint does
        fused = f"model.layers.0.mlp.experts.{name}"
        weight = torch.randn(shape).to(torch.float8_e4m3fn)
        scale = torch.rand(3, -(-shape[1] // 128), -(-shape[2] // 128))
        whole = dequantised(weight, scale, 128)
        for rank in range(size):
            part = shard_fused(fused, weight, spec, rank, size)
            part_scale = shard_fused(fused + "_scale_inv", scale, spec, rank, size)
            assert part_scale.shape[dim] == part.shape[dim] // gcd(128, width // size)
            expected = shard_fused(fused, whole, spec, rank, size)
            if name == "w13":  # the blocks of gate and up each start anew
                part, part_scale = part.unflatten(1, (2, -1)), part_scale.unflatten(1, (2, -1))
                expected = expected.unflatten(1, (2, -1))
            assert torch.equal(dequantize_block(part, part_scale), expected)


def test_a_cut_below_the_depth_of_a_tensor_core_instruction_is_refused() -> None:
    spec = fp8_spec(block=32)
    name = "model.layers.0.mlp.experts.w13_scale_inv"
    message = r"size 2 leaves 16 rows or columns of moe_intermediate_size \(32\) to a rank.*no multiple of 32"
    with pytest.raises(WeightError, match=message):
        shard_fused(name, torch.rand(8, 2, 2), spec, 0, 2)


RECURRENT = [f"linear_attn.{name}" for name in ("in_proj_qkvz", "in_proj_ba", "out_proj")]
ATTENTION = [f"self_attn.{name}_proj" for name in "qkvo"]
SHARED = [f"mlp.shared_expert.{name}_proj" for name in ("gate", "up", "down")]
PUBLISHED = {
    "hidden_size": 2048,
    "head_dim": 256,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 32,
    "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}


def published_fp8(ignored: list[str], **changes: Any) -> Qwen3NextSpec:
    """The published FP8 checkpoint's sizes and blocks, or others' of its kind."""
    quant = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ignored}
    return small_spec(**PUBLISHED | changes, quantization_config=quant)


@pytest.mark.parametrize("size", [1, 2, 4, 8, 16])
def test_the_published_fp8_checkpoint_fits_every_size(size: int) -> None:
    """Its list names modules layer by layer, and those of linear attention in the layers that have it."""
    check_tensor_parallel(published_fp8(["linear_attn.in_proj_ba"]), size)
    linear = [f"model.layers.{i}.linear_attn.in_proj_ba" for i in range(3)]
    check_tensor_parallel(published_fp8(linear), size)
    if size > 1:
        with pytest.raises(WeightError, match=r"linear_num_value_heads"):
            check_tensor_parallel(published_fp8(linear[1:]), size)


def test_modules_of_one_kind_of_mlp_are_looked_for_where_it_is() -> None:
    """A plain MLP too narrow for blocks on two ranks, and a shared expert: in FP8 in the layers that have them only."""
    dense = {"mlp_only_layers": [1], "intermediate_size": 32, "shared_expert_intermediate_size": 32}
    plain = [f"model.layers.1.mlp.{part}_proj" for part in ("gate", "up", "down")]
    shared = [f"model.layers.{i}.mlp.shared_expert" for i in (0, 2, 3)]
    check_tensor_parallel(published_fp8([*RECURRENT, *plain, *shared], **dense), 2)
    with pytest.raises(WeightError, match=r"of shared_expert_intermediate_size \(32\)"):
        check_tensor_parallel(published_fp8([*RECURRENT, *plain, *shared[1:]], **dense), 2)
    with pytest.raises(WeightError, match=r"of intermediate_size \(32\)"):
        check_tensor_parallel(published_fp8([*RECURRENT, *shared], **dense), 2)


@pytest.mark.parametrize(
    ("ignored", "changes", "field"),
    [
        ([], {}, r"leaves 4 rows or columns of linear_num_value_heads \(32\).*no multiple of 128"),
        (RECURRENT, {"head_dim": 64}, r"leaves 64 rows or columns of num_key_value_heads \(128\)"),
        (
            RECURRENT,
            {"shared_expert_intermediate_size": 128},
            r"leaves 16 rows or columns of shared_expert_intermediate_size \(128\).*multiple of 32",
        ),
    ],
)
def test_what_fp8_blocks_cannot_be_cut_to_is_named(ignored: list[str], changes: dict[str, Any], field: str) -> None:
    with pytest.raises(WeightError, match=field):
        check_tensor_parallel(published_fp8(ignored, **changes), 8)
    check_tensor_parallel(published_fp8(RECURRENT + ATTENTION + SHARED, **changes), 8)


@pytest.mark.parametrize(
    ("changes", "size", "message"),
    [
        ({}, 3, r"tensor-parallel size 3 does not divide linear_num_key_heads \(2\): use one of 1, 2"),
        ({}, 4, r"size 4 does not divide linear_num_key_heads \(2\)"),
        ({"linear_num_key_heads": 4}, 8, r"does not divide linear_num_key_heads \(4\): use one of 1, 2, 4\."),
        (
            {"linear_num_key_heads": 8, "linear_num_value_heads": 8},
            8,
            r"does not divide num_attention_heads \(4\): use one of 1, 2, 4\.",
        ),
        (
            {"num_attention_heads": 12, "num_key_value_heads": 3},
            2,
            r"size 2 does not divide num_key_value_heads \(3\)",
        ),
        ({"moe_intermediate_size": 33}, 2, r"does not divide moe_intermediate_size \(33\): use one of 1, 3, 11, 33\."),
        ({"shared_expert_intermediate_size": 7}, 2, r"does not divide shared_expert_intermediate_size \(7\)"),
        ({"intermediate_size": 7, "mlp_only_layers": [0]}, 2, r"does not divide intermediate_size \(7\)"),
    ],
)
def test_sizes_that_do_not_divide_are_refused_in_one_sentence(changes: dict, size: int, message: str) -> None:
    with pytest.raises(WeightError, match=message) as caught:
        check_tensor_parallel(small_spec(**changes), size)
    assert "\n" not in str(caught.value)


def test_a_dense_size_that_no_layer_has_does_not_matter() -> None:
    check_tensor_parallel(small_spec(intermediate_size=7), 2)
    check_tensor_parallel(small_spec(vocab_size=127), 2)


def test_a_rank_outside_the_size_is_refused() -> None:
    with pytest.raises(WeightError, match="rank 2 is outside 0 to 1"):
        shard_fused("model.norm.weight", torch.rand(64), small_spec(), 2, 2)
