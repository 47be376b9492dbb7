"""Checkpoint tensors to fused ones: transformers' layouts, both spellings of experts, FP8, refusals."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from qwen3next_plugin.config import GdnSpec, parse_config
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.weights import (
    deinterleave_ba,
    deinterleave_ba_scales,
    deinterleave_qkvz,
    deinterleave_qkvz_scales,
    fuse_checkpoint,
    fused_stream,
)
from tests.configs import new_form
from tests.cpu.core.checkpoints import (
    Tensors,
    dequantised,
    fp8_checkpoint,
    fp8_spec,
    random_checkpoint,
    small_spec,
    stacked,
)


@st.composite
def gdn_specs(draw: st.DrawFn, unit: int = 1) -> GdnSpec:
    k_heads = draw(st.integers(1, 4))
    v_heads = k_heads * draw(st.sampled_from([1, 2, 3, 4]))
    return GdnSpec(k_heads, v_heads, unit * draw(st.integers(1, 5)), unit * draw(st.integers(1, 5)), 4)


def _their_order(gdn: GdnSpec, qkvz: torch.Tensor, ba: torch.Tensor) -> list[torch.Tensor]:
    """Row numbers of q, k, v, z, b, a as transformers' layer splits its projections."""
    config = Qwen3NextConfig(
        hidden_size=8,
        linear_num_key_heads=gdn.num_k_heads,
        linear_num_value_heads=gdn.num_v_heads,
        linear_key_head_dim=gdn.head_k_dim,
        linear_value_head_dim=gdn.head_v_dim,
    )
    layer = Qwen3NextGatedDeltaNet(config, 0)
    return [part.flatten() for part in layer.fix_query_key_value_ordering(qkvz[None, None], ba[None, None])]


@given(gdn_specs())
def test_flat_rows_are_where_transformers_finds_them(gdn: GdnSpec) -> None:
    qkvz = torch.arange(2 * gdn.key_dim + 2 * gdn.value_dim)
    ba = torch.arange(2 * gdn.num_v_heads)
    *expected_qkvz, b, a = _their_order(gdn, qkvz, ba)
    assert torch.equal(deinterleave_qkvz(qkvz[:, None], gdn)[:, 0], torch.cat(expected_qkvz))
    assert torch.equal(deinterleave_ba(ba[:, None], gdn)[:, 0], torch.cat([b, a]))


@given(gdn_specs(unit=16), st.sampled_from([8, 16]))
def test_block_scales_follow_their_rows(gdn: GdnSpec, block: int) -> None:
    rows = 2 * gdn.key_dim + 2 * gdn.value_dim
    weight, scale = torch.randn(rows, 24), torch.rand(rows // block, -(-24 // block))
    flat = dequantised(deinterleave_qkvz(weight, gdn), deinterleave_qkvz_scales(scale, gdn, block), block)
    assert torch.equal(flat, deinterleave_qkvz(dequantised(weight, scale, block), gdn))


def test_block_scales_of_the_80b_layer() -> None:
    gdn = GdnSpec(16, 32, 128, 128, 4)
    scale = torch.rand(96, 16)
    flat = deinterleave_qkvz_scales(scale, gdn)
    assert torch.equal(flat[16:32], scale[1::6]), "the key heads are every sixth block"
    assert torch.equal(deinterleave_ba_scales(scale[:1], gdn), scale[:1]), "64 rows in one block keep their scale"


def test_block_scales_that_would_mix_heads_are_refused() -> None:
    with pytest.raises(WeightError, match=r"in_proj_qkvz.*multiples of 128"):
        deinterleave_qkvz_scales(torch.rand(4, 4), GdnSpec(2, 4, 64, 64, 4))
    with pytest.raises(WeightError, match="in_proj_ba"):
        deinterleave_ba_scales(torch.rand(2, 4), GdnSpec(64, 128, 128, 128, 4))


def test_rows_that_do_not_fit_the_heads_are_refused() -> None:
    with pytest.raises(WeightError, match=r"in_proj_qkvz.weight has 5 rows.*make 12"):
        deinterleave_qkvz(torch.rand(5, 3), GdnSpec(1, 1, 3, 3, 4))


@pytest.mark.parametrize("dense", [[], [1, 3]])
def test_fused_tensors_hold_the_checkpoints_rows_in_the_contracted_places(dense: list[int]) -> None:
    spec = small_spec(mlp_only_layers=dense)
    tensors = random_checkpoint(spec)
    fused = fuse_checkpoint(tensors.items(), spec)
    gdn, prefix = spec.gdn, "model.layers.0.linear_attn."
    assert fused[prefix + "conv1d.weight"].shape == (gdn.conv_dim, 4)
    assert torch.equal(fused[prefix + "conv1d.weight"], tensors[prefix + "conv1d.weight"][:, 0])
    assert torch.equal(
        fused[prefix + "in_proj_qkvz.weight"], deinterleave_qkvz(tensors[prefix + "in_proj_qkvz.weight"], gdn)
    )
    assert fused[prefix + "A_log"].dtype is torch.float32 and fused[prefix + "dt_bias"].dtype is torch.float32
    for layer in ("model.layers.3.", "mtp.layers.0."):
        parts = [tensors[f"{layer}self_attn.{p}_proj.weight"] for p in "qkv"]
        assert torch.equal(fused[f"{layer}self_attn.qkv_proj.weight"], torch.cat(parts))
    for layer, inner in (("model.layers.2.", "shared_expert."), ("mtp.layers.0.", "shared_expert.")):
        parts = [tensors[f"{layer}mlp.{inner}{p}_proj.weight"] for p in ("gate", "up")]
        assert torch.equal(fused[f"{layer}mlp.{inner}gate_up_proj.weight"], torch.cat(parts))
    for j in range(spec.moe.num_experts):
        gate, up, down = (tensors[f"model.layers.2.mlp.experts.{j}.{p}_proj.weight"] for p in ("gate", "up", "down"))
        assert torch.equal(fused["model.layers.2.mlp.experts.w13"][j], torch.cat([gate, up]))
        assert torch.equal(fused["model.layers.2.mlp.experts.w2"][j], down)
    for index in dense:
        assert fused[f"model.layers.{index}.mlp.gate_up_proj.weight"].shape == (2 * spec.intermediate_size, 64)
        assert f"model.layers.{index}.mlp.experts.w13" not in fused
    for name in (
        "model.embed_tokens.weight",
        "lm_head.weight",
        "model.norm.weight",
        "mtp.fc.weight",
        "mtp.norm.weight",
    ):
        assert torch.equal(fused[name], tensors[name])


def test_transformers_own_state_dict_fuses_to_the_same_as_its_saved_files() -> None:
    config = new_form(mlp_only_layers=[2])
    model = Qwen3NextForCausalLM(Qwen3NextConfig(**config))
    spec = parse_config(config)
    fused = fuse_checkpoint(model.state_dict().items(), spec)
    layer = model.model.layers[1]
    expected = layer.linear_attn.fix_query_key_value_ordering(
        layer.linear_attn.in_proj_qkvz.weight.T[None], layer.linear_attn.in_proj_ba.weight.T[None]
    )
    flat = torch.cat([part.reshape(64, -1) for part in expected[:4]], dim=1).T
    assert torch.equal(fused["model.layers.1.linear_attn.in_proj_qkvz.weight"], flat)
    assert torch.equal(fused["model.layers.1.mlp.experts.w13"], layer.mlp.experts.gate_up_proj)
    assert "mtp.fc.weight" not in fused


@pytest.mark.parametrize("make", [random_checkpoint, fp8_checkpoint])
def test_stacked_and_single_experts_are_the_same_model_in_any_order(make: Callable[..., Tensors]) -> None:
    spec = fp8_spec()
    tensors = make(spec)
    one, other = fuse_checkpoint(tensors.items(), spec), fuse_checkpoint(stacked(tensors, spec).items(), spec)
    backwards = fuse_checkpoint(reversed(list(tensors.items())), spec)
    assert one.keys() == other.keys() == backwards.keys()
    for name, tensor in one.items():
        for second in (other[name], backwards[name]):
            assert torch.equal(tensor.float(), second.float()), name


def test_fp8_model_dequantises_to_the_dequantised_checkpoint() -> None:
    spec = fp8_spec()
    tensors = fp8_checkpoint(spec)
    fused = fuse_checkpoint(tensors.items(), spec)
    wide = {
        name: dequantised(tensor, tensors[name + "_scale_inv"], 16) if name + "_scale_inv" in tensors else tensor
        for name, tensor in tensors.items()
        if not name.endswith("_scale_inv")
    }
    expected = fuse_checkpoint(wide.items(), spec)
    quantised = [name for name in fused if name + "_scale_inv" in fused]
    kinds = {name.split("layers.")[-1][2:] for name in quantised}
    assert {
        "linear_attn.in_proj_qkvz.weight",
        "self_attn.qkv_proj.weight",
        "mlp.experts.w13",
        "mlp.experts.w2",
    } <= kinds
    for name in quantised:
        scale = fused[name + "_scale_inv"]
        assert fused[name].dtype is torch.float8_e4m3fn and scale.dtype is torch.float32
        assert torch.equal(dequantised(fused[name], scale, 16), expected[name]), name


def test_stream_holds_nothing_and_says_where_each_tensor_goes() -> None:
    spec = small_spec()
    consumed: list[str] = []

    def tensors() -> object:
        for name, tensor in random_checkpoint(spec).items():
            consumed.append(name)
            yield name, tensor

    stream = fused_stream(tensors(), spec)  # type: ignore[arg-type]
    places = {}
    for count, (name, _tensor, placement) in enumerate(stream, start=1):
        assert len(consumed) == count, "one tensor in, one out"
        assert placement.name == name
        places[consumed[-1]] = placement
    layer = "model.layers.3."
    assert places[layer + "self_attn.k_proj.weight"] == (layer + "self_attn.qkv_proj.weight", "k", None)
    assert places[layer + "mlp.experts.5.up_proj.weight"] == (layer + "mlp.experts.w13", "up", 5)
    assert places[layer + "mlp.experts.5.down_proj.weight"] == (layer + "mlp.experts.w2", None, 5)
    assert places[layer + "mlp.shared_expert.gate_proj.weight"].shard == "gate"
    assert places["mtp.fc.weight"] == ("mtp.fc.weight", None, None)


def test_scopes_part_the_decoder_from_the_drafter() -> None:
    spec = small_spec()
    tensors = random_checkpoint(spec)
    decoder = {name for name, _, _ in fused_stream(tensors.items(), spec, scope="model")}
    drafter = {name for name, _, _ in fused_stream(tensors.items(), spec, scope="mtp")}
    assert not any(name.startswith("mtp.") for name in decoder) and "model.norm.weight" in decoder
    assert decoder & drafter == {"model.embed_tokens.weight", "lm_head.weight"}
    assert decoder | drafter == set(fuse_checkpoint(tensors.items(), spec))
    with pytest.raises(WeightError, match="mtp.fc.weight is not in the checkpoint"):
        list(fused_stream(random_checkpoint(spec, mtp=False).items(), spec, scope="mtp"))


def test_mtp_is_wanted_when_the_config_says_so_or_the_checkpoint_has_some() -> None:
    without = random_checkpoint(small_spec(), mtp=False)
    fuse_checkpoint(without.items(), small_spec())
    with pytest.raises(WeightError, match=r"mtp\.fc\.weight is not in the checkpoint"):
        fuse_checkpoint(without.items(), small_spec(num_nextn_predict_layers=1))
    some = without | {"mtp.norm.weight": torch.rand(64)}
    with pytest.raises(WeightError, match=r"mtp\.fc\.weight is not in the checkpoint"):
        fuse_checkpoint(some.items(), small_spec())


def test_what_says_nothing_new_is_passed_over() -> None:
    spec = small_spec(tie_word_embeddings=True)
    tensors = random_checkpoint(spec)
    extra = {"lm_head.weight": torch.rand(128, 64), "model.layers.3.self_attn.rotary_emb.inv_freq": torch.rand(4)}
    assert fuse_checkpoint((tensors | extra).items(), spec).keys() == fuse_checkpoint(tensors.items(), spec).keys()


def _drop(name: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.__delitem__(name)


def _put(name: str, *shape: int, dtype: torch.dtype = torch.bfloat16) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: torch.ones(shape).to(dtype)})


SPOILED: dict[str, tuple[Callable[[Tensors], None], str]] = {
    "missing": (_drop("model.layers.1.linear_attn.A_log"), r"model\.layers\.1\.linear_attn\.A_log is not in"),
    "missing part": (
        _drop("model.layers.3.self_attn.v_proj.weight"),
        r"layers\.3\.self_attn\.v_proj\.weight is not in",
    ),
    "missing expert": (_drop("mtp.layers.0.mlp.experts.7.up_proj.weight"), r"experts\.7\.up_proj\.weight is not in"),
    "missing scale": (
        _drop("model.layers.0.linear_attn.out_proj.weight_scale_inv"),
        r"layers\.0\.linear_attn\.out_proj\.weight_scale_inv is not in",
    ),
    "unknown": (
        _put("model.layers.0.self_attn.q_proj.weight", 1),
        r"layers\.0\.self_attn\.q_proj\.weight is no tensor",
    ),
    "layer too many": (_put("model.layers.4.input_layernorm.weight", 64), r"layers\.4\..*num_hidden_layers"),
    "second MTP layer": (_put("mtp.layers.1.input_layernorm.weight", 64), r"mtp\.layers\.1\..* is no tensor"),
    "expert too many": (_put("model.layers.0.mlp.experts.8.up_proj.weight", 32, 64), r"experts\.8\..*num_experts"),
    "shape": (_put("model.norm.weight", 63), r"model\.norm\.weight has shape \[63\].*makes it \[64\]"),
    "stacked shape": (_put("model.layers.0.mlp.experts.down_proj", 8, 32, 64), r"\[8, 32, 64\].*\[8, 64, 32\]"),
    "scale shape": (
        _put("model.layers.3.self_attn.k_proj.weight_scale_inv", 1, 4),
        r"k_proj\.weight_scale_inv has shape \[1, 4\].*\[4, 4\]",
    ),
    "scale of a norm": (_put("model.norm.weight_scale_inv", 1), r"model\.norm\.weight_scale_inv.*never quantised"),
    "integers": (_put("lm_head.weight", 128, 64, dtype=torch.int32), r"lm_head\.weight holds torch\.int32"),
    "half in FP8": (_put("model.layers.3.self_attn.k_proj.weight", 64, 64), r"qkv_proj\.weight would be made of"),
    "other quantisation": (
        _put("model.layers.0.linear_attn.out_proj.qweight", 8, 8),
        r"out_proj\.qweight is part of a quantised tensor, but config\.json has an fp8 quantization_config",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoint_gets_one_sentence_with_the_tensors_name(name: str) -> None:
    spec = fp8_spec()
    tensors = fp8_checkpoint(spec)
    spoil, message = SPOILED[name]
    spoil(tensors)
    with pytest.raises(WeightError, match=message) as caught:
        fuse_checkpoint(tensors.items(), spec)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_a_tensor_twice_is_refused() -> None:
    spec = small_spec()
    tensors = list(random_checkpoint(spec).items())
    with pytest.raises(WeightError, match="model.norm.weight is in the checkpoint twice"):
        fuse_checkpoint([*tensors, ("model.norm.weight", torch.rand(64))], spec)


def test_quantisations_that_cannot_be_loaded_are_named() -> None:
    for quant, name, match in (
        ({}, "model.layers.0.linear_attn.out_proj.qweight", "config.json has no quantization_config, which"),
        ({"quant_method": "fp8"}, "model.layers.0.linear_attn.out_proj.weight_scale", "an fp8 quantization_config"),
        (
            {"quant_method": "fp8"},
            "model.layers.0.linear_attn.out_proj.weight_scale_inv",
            "no quantization_config with",
        ),
    ):
        spec = small_spec(quantization_config=quant)
        with pytest.raises(WeightError, match=match):
            fuse_checkpoint({name: torch.rand(1)}.items(), spec)


def test_parts_that_blocks_do_not_divide_are_refused() -> None:
    spec = fp8_spec(block=64)  # experts of width 32: gate and up would share a block of 64 rows
    with pytest.raises(WeightError, match=r"gate_proj\.weight has 32 rows, which FP8 blocks of 64 do not divide"):
        fuse_checkpoint({"model.layers.0.mlp.experts.0.gate_proj.weight_scale_inv": torch.rand(1, 1)}.items(), spec)


def test_half_of_the_experts_is_enough_where_completeness_is_not_asked() -> None:
    spec = small_spec()
    tensors = {name: t for name, t in random_checkpoint(spec).items() if ".experts.7." not in name}
    assert list(fused_stream(tensors.items(), spec, complete=False))
    with pytest.raises(WeightError, match=r"experts\.7\.gate_proj"):
        list(fused_stream(tensors.items(), spec))
