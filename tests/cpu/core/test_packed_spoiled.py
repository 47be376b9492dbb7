"""Checkpoints in packed integers that do not fit their config: one sentence each, from the headers where they show."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.demo.packing import packed_tensors
from qwen3next_plugin.demo.random import save_shards
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.spec import IntegerFormat
from qwen3next_plugin.weights import check_checkpoint, fuse_checkpoint
from tests.cpu.core.checkpoints import Tensors, packed_model

AWQ = IntegerFormat("awq", 4, 16, symmetric=False)
PACKED = IntegerFormat("pack-quantized", 4, 16)

Spoil = Callable[[Tensors], None]
ROW = "model.layers.0.linear_attn.out_proj"
KEY = "model.layers.3.self_attn.k_proj"
EXPERT = "model.layers.0.mlp.experts.3.up_proj"


def drop(name: str) -> Spoil:
    return lambda tensors: tensors.__delitem__(name)


def put(name: str, tensor: torch.Tensor) -> Spoil:
    return lambda tensors: tensors.update({name: tensor})


def change(name: str, function: Callable[[torch.Tensor], torch.Tensor]) -> Spoil:
    return lambda tensors: tensors.update({name: function(tensors[name])})


def plain(module: str, *shape: int) -> Spoil:
    def spoil(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(f"{module}.")]:
            del tensors[name]
        tensors[f"{module}.weight"] = torch.rand(shape)

    return spoil


SPOILED: dict[str, tuple[str, Spoil, str]] = {
    "no scales": ("awq", drop(f"{EXPERT}.scales"), r"experts\.3\.up_proj\.scales is not in the checkpoint"),
    "no zero points": ("awq", drop(f"{ROW}.qzeros"), r"out_proj\.qzeros is not in"),
    "no codes": ("gptq", drop(f"{ROW}.qweight"), r"out_proj\.weight is not in"),
    "no scale of int8": ("w8a8", drop(f"{ROW}.weight_scale"), r"out_proj\.weight_scale is not in"),
    "shape of codes": ("awq", change(f"{ROW}.qweight", lambda t: t[:-1]), r"out_proj\.qweight has shape \[127, 8\]"),
    "shape of scales": (
        "w4a16",
        change(f"{KEY}.weight_scale", lambda t: t[:, :1]),
        r"weight_scale has shape \[128, 1\]",
    ),
    "codes as floats": ("gptq", change(f"{ROW}.qweight", torch.Tensor.float), r"qweight holds torch\.float32"),
    "codes as int64": ("gptq", change(f"{ROW}.qweight", torch.Tensor.long), r"qweight holds torch\.int64.*int32"),
    "scales as integers": ("gptq", change(f"{ROW}.scales", torch.Tensor.int), r"scales holds torch\.int32"),
    "activation order": (
        "gptq",
        change(f"{ROW}.g_idx", lambda t: t.flip(0)),
        r"out_proj\.g_idx puts columns into groups by activation order.*desc_act false",
    ),
    "zero points of a symmetric format": (
        "gptq",
        change(f"{ROW}.qzeros", lambda t: t + 1),
        r"out_proj\.qzeros has zero",
    ),
    "another shape inside": (
        "w4a16",
        put(f"{ROW}.weight_shape", torch.tensor([64, 64])),
        r"out_proj\.weight_shape says \[64, 64\] where config\.json makes it \[64, 128\]",
    ),
    "half of a fused tensor": ("w4a16", plain(KEY, 128, 64), r"qkv_proj\.weight would be made of"),
    "one expert unquantised": ("gptq", plain(EXPERT, 32, 64), r"experts\.w13 would be made of"),
    "left alone by the config": (
        "awq",
        lambda tensors: tensors.update(packed_tensors("mtp.fc", torch.rand(64, 128), AWQ)),
        r"mtp\.fc\.\w+ is in the checkpoint, but config\.json's quantization_config leaves mtp\.fc as it is",
    ),
    "both": ("gptq", put(f"{ROW}.weight", torch.rand(64, 128)), r"out_proj\.qweight is in.*unquantised: keep one"),
    "scale of a plain weight": (
        "w8a8",
        change(f"{ROW}.weight", torch.Tensor.float),
        r"out_proj\.weight_scale is in the checkpoint beside an unquantised",
    ),
    "norm": (
        "w4a16",
        put("model.norm.weight_packed", torch.zeros(1, 1, dtype=torch.int32)),
        r"model\.norm\.weight_packed.*never quantised",
    ),
    "other packing": (
        "gptq",
        put(f"{ROW}.weight_packed", torch.zeros(1, 1, dtype=torch.int32)),
        r"weight_packed is no",
    ),
}


@pytest.mark.parametrize("name", SPOILED)
def test_spoiled_checkpoints_get_one_sentence_with_the_tensors_name(name: str) -> None:
    kind, spoil, message = SPOILED[name]
    spec, tensors = packed_model(kind)
    spoil(tensors)
    with pytest.raises(WeightError, match=message) as caught:
        fuse_checkpoint(tensors.items(), spec)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


@pytest.mark.parametrize("name", [n for n in SPOILED if "no " in n or n.startswith("shape") or n in ("both", "norm")])
def test_headers_show_it_already(name: str, tmp_path: Path) -> None:
    kind, spoil, message = SPOILED[name]
    spec, tensors = packed_model(kind)
    save_shards(tmp_path, iter(tensors.items()))
    check_checkpoint(tmp_path, spec)
    spoil(tensors)
    save_shards(tmp_path, iter(tensors.items()))
    with pytest.raises(WeightError, match=message):
        check_checkpoint(tmp_path, spec)


def test_layers_that_run_as_one_have_one_format() -> None:
    spec, tensors = packed_model("w4a16")
    assert spec.quant is not None
    first, *rest = spec.quant.rules
    (everything,) = rest
    assert everything.format is not None
    other = replace(everything, format=replace(everything.format, group_size=16), patterns=(r".*\.k_proj$",))
    mixed = replace(spec, quant=replace(spec.quant, rules=(first, other, everything)))
    tensors |= dict(packed_tensors(KEY, torch.rand(128, 64), replace(PACKED, group_size=16)))
    with pytest.raises(WeightError, match=r"k_proj is stored as .*groups of 16 and .*q_proj as .*groups of 32"):
        fuse_checkpoint(tensors.items(), mixed)


def test_groups_that_do_not_divide_the_columns_are_refused() -> None:
    spec, tensors = packed_model("gptq")
    assert spec.quant is not None
    rules = tuple(
        replace(rule, format=replace(rule.format, group_size=48)) if rule.format else rule for rule in spec.quant.rules
    )
    wrong = replace(spec, quant=replace(spec.quant, rules=rules))
    with pytest.raises(WeightError, match=r"groups of 48 do not divide its \d+ columns"):
        fuse_checkpoint(tensors.items(), wrong)
