"""Models in packed integers: fused, sliced and placed, they are what their unpacked checkpoint is."""

from dataclasses import replace

import pytest
import torch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.demo.shapes import QUANTISATIONS
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.reference.model import prepare_weights
from qwen3next_plugin.spec import IntegerFormat
from qwen3next_plugin.weights import Placement, check_tensor_parallel, fuse_checkpoint, shard_fused
from tests.cpu.core.checkpoints import Tensors, packed_model

KINDS = [kind for kind in QUANTISATIONS if kind != "fp8"]


# What the value of a part's own numbers is, said once more and without the code under test.
def values(tensors: Tensors, module: str, stored: IntegerFormat) -> torch.Tensor:
    """float64 [N, K] of a module of the checkpoint, number by number."""

    def nibbles(words: torch.Tensor, order: tuple[int, ...] = tuple(range(8))) -> torch.Tensor:
        count = 32 // stored.bits
        parts = [(words.long() >> (stored.bits * i)) & ((1 << stored.bits) - 1) for i in range(count)]
        return torch.stack([parts[order[i] if count == 8 else i] for i in range(count)], dim=-1).flatten(-2)

    if stored.packing == "int-quantized":
        return tensors[f"{module}.weight"].double() * tensors[f"{module}.weight_scale"].double()
    if stored.packing == "pack-quantized":
        shown, scale = nibbles(tensors[f"{module}.weight_packed"]), tensors[f"{module}.weight_scale"]
        zero = torch.full_like(scale, 1 << (stored.bits - 1))
    else:
        scale, words = tensors[f"{module}.scales"].T, tensors[f"{module}.qweight"]
        if stored.packing == "awq":
            where = (0, 4, 1, 5, 2, 6, 3, 7)
            shown, zero = nibbles(words, where).T, nibbles(tensors[f"{module}.qzeros"], where).T
        else:
            shown, zero = nibbles(words.T), nibbles(tensors[f"{module}.qzeros"]).T + 1
    group = shown.shape[1] // scale.shape[1]
    wide = zero.double().repeat_interleave(group, 1), scale.double().repeat_interleave(group, 1)
    return (shown.double() - wide[0]) * wide[1]


def unpacked(spec: Qwen3NextSpec, tensors: Tensors) -> Tensors:
    """The same checkpoint in float64."""
    assert spec.quant is not None
    wide: Tensors = {}
    for name, tensor in tensors.items():
        module, _, suffix = name.rpartition(".")
        stored = spec.quant.integer_format(module)
        if suffix in ("qweight", "weight_packed") or tensor.dtype == torch.int8:
            assert stored is not None
            wide[f"{module}.weight"] = values(tensors, module, stored)
        elif not suffix.startswith(("qzeros", "scales", "g_idx", "weight_")):
            wide[name] = tensor.double()
    return wide


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_fuses_to_what_its_unpacked_checkpoint_fuses_to(kind: str) -> None:
    spec, tensors = packed_model(kind)
    fused = fuse_checkpoint(tensors.items(), spec)
    expected = fuse_checkpoint(unpacked(spec, tensors).items(), replace(spec, quant=None))
    found = prepare_weights(fused, torch.float64)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor.double(), rtol=1e-6, atol=1e-9, msg=name)
    dtype = torch.uint8 if "8" not in kind else torch.int8
    kept = {name.split("layers.")[-1][2:] for name, tensor in fused.items() if tensor.dtype == dtype}
    assert {"linear_attn.in_proj_qkvz.weight", "self_attn.qkv_proj.weight", "mlp.experts.w13", "mlp.experts.w2"} <= kept
    assert not {"mlp.gate.weight", "mlp.shared_expert_gate.weight"} & kept, "engines run these unquantised"
    assert all(fused[name].is_floating_point() for name in ("lm_head.weight", "model.embed_tokens.weight"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [2, 4])
def test_slices_are_those_of_the_dequantised_whole(kind: str, size: int) -> None:
    """With 4 ranks an expert's 32 columns leave 8 to a rank, which no group of 16 fits: 64 wide ones here."""
    wide = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 4}
    spec, tensors = packed_model(kind, num_attention_heads=4, **wide)
    check_tensor_parallel(spec, size)
    fused = fuse_checkpoint(tensors.items(), spec)
    whole = prepare_weights(fused, torch.float64)
    cut = 0
    for name, expected in whole.items():
        if fused[name].is_floating_point():
            continue
        for rank in range(size):
            parts = {
                n: shard_fused(n, fused[n], spec, rank, size)
                for n in (name, f"{name}_scale", f"{name}_zero")
                if n in fused
            }
            mine = prepare_weights(parts, torch.float64)[name]
            assert torch.equal(mine, shard_fused(name, expected, spec, rank, size)), name
            cut += mine.shape != expected.shape
    assert cut > 20


@pytest.mark.parametrize("expert_parallel", [False, True])
def test_experts_land_where_their_slices_belong(expert_parallel: bool) -> None:
    spec, tensors = packed_model("awq")
    fused = fuse_checkpoint(tensors.items(), spec)
    prefix = "model.layers.1.mlp.experts."
    for rank in range(2):
        shard = ExpertShard(spec, rank, 2, expert_parallel)
        for name in ("w2", "w2_scale", "w2_zero", "w13", "w13_scale"):
            whole = fused[prefix + name]
            expected = whole[rank * 2 : rank * 2 + 2] if expert_parallel else None
            if expected is None:
                expected = shard_fused(prefix + name, whole, spec, rank, 2)
            target = torch.zeros_like(expected)
            shard.place(target, whole, Placement(prefix + name))
            assert torch.equal(target, expected), name


def test_a_cut_below_sixteen_columns_is_refused() -> None:
    spec, _ = packed_model("w4a16", linear_num_key_heads=4)
    with pytest.raises(WeightError, match=r"size 4 leaves 8 columns of moe_intermediate_size \(32\).*smaller size"):
        check_tensor_parallel(spec, 4)


def test_mtp_layers_that_the_config_means_and_the_checkpoint_does_not_stay_as_they_are() -> None:
    spec, tensors = packed_model("gptq")
    assert spec.quant is not None and spec.quant.integer_format("mtp.layers.0.self_attn.q_proj") is not None
    fused = fuse_checkpoint(tensors.items(), spec)
    mtp = [name for name in fused if name.startswith("mtp.")]
    assert mtp and all(fused[name].is_floating_point() for name in mtp)
    assert torch.equal(fused["mtp.fc.weight"], tensors["mtp.fc.weight"])
