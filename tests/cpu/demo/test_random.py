"""Checkpoints with random weights: any shape, the published layout, the same bytes for the same seed."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo import write_random_checkpoint
from qwen3next_plugin.demo.random import count_parameters, save_shards
from qwen3next_plugin.demo.shapes import PUBLISHED, SHAPES
from qwen3next_plugin.errors import ConfigError, SettingsError
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.weights import check_checkpoint, open_checkpoint

SMALL = [shape for shape in SHAPES if shape not in ("slice", "80b")]


@pytest.mark.parametrize("shape", SMALL)
def test_every_small_shape_is_complete_and_computes(shape: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, shape)
    summary = check_checkpoint(tmp_path, load_spec(tmp_path))
    assert summary.has_mtp
    model = ReferenceModel.from_checkpoint(tmp_path)
    tokens = torch.arange(20)[None]
    with torch.no_grad():
        hidden = model.hidden(tokens)
        logits = model.logits(hidden)
        drafts = model.logits(model.mtp(hidden[:, :-1], tokens[:, 1:]))
    assert bool(torch.isfinite(logits).all() and torch.isfinite(drafts).all())
    assert 0.5 < float(logits.std()) < 10, "logits should be neither flat nor a single spike"


def test_head_ratios(tmp_path: Path) -> None:
    for ratio in (1, 2, 4):
        spec = load_spec(write_random_checkpoint(tmp_path / str(ratio), f"ratio{ratio}", weights=False))
        assert spec.gdn.heads_per_group == ratio


def test_the_seed_decides_the_weights(tmp_path: Path) -> None:
    files = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        files.append((write_random_checkpoint(tmp_path / name, "tiny", seed) / "model.safetensors").read_bytes())
    assert files[0] == files[1] != files[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_dtype(dtype: str, tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "tiny", dtype=dtype)
    assert load_spec(tmp_path).dtype is getattr(torch, dtype)
    for name, tensor in open_checkpoint(tmp_path):
        wide = name.endswith(("A_log", "dt_bias"))
        assert tensor.dtype is (torch.float32 if wide else getattr(torch, dtype)), name


def test_numbers_are_drawn_so_that_errors_show(tmp_path: Path) -> None:
    tensors = dict(open_checkpoint(write_random_checkpoint(tmp_path, "tiny")))
    for name, tensor in tensors.items():
        if name.endswith("linear_attn.norm.weight"):
            assert 0.8 < tensor.float().mean() < 1.2 and tensor.float().std() > 0.03, name
        elif "norm" in name:
            assert abs(tensor.float().mean()) < 0.1 and tensor.float().std() > 0.03, name
        elif name.endswith("A_log"):
            decay = tensor.exp() * torch.nn.functional.softplus(tensors[name.replace("A_log", "dt_bias")])
            assert bool((decay > 0).all()) and float(decay.min()) < 0.5, "some head should remember for long"


def test_fp8_blocks(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "blocks", fp8=True)
    spec = load_spec(tmp_path)
    assert spec.quant is not None and spec.quant.weight_block_size == (128, 128)
    tensors = dict(open_checkpoint(tmp_path))
    scale = tensors["model.layers.0.linear_attn.in_proj_qkvz.weight_scale_inv"]
    codes = tensors["model.layers.0.linear_attn.in_proj_qkvz.weight"]
    assert codes.dtype is torch.float8_e4m3fn and scale.shape == (codes.shape[0] // 128, codes.shape[1] // 128)
    for name in ("lm_head", "mtp.fc", "model.layers.0.mlp.gate", "model.layers.0.linear_attn.in_proj_ba"):
        assert tensors[f"{name}.weight"].dtype is torch.bfloat16 and f"{name}.weight_scale_inv" not in tensors
    check_checkpoint(tmp_path, spec)


def test_the_80b_config_comes_without_weights(tmp_path: Path) -> None:
    write_random_checkpoint(tmp_path, "80b")
    assert not list(tmp_path.glob("*.safetensors"))
    assert json.loads((tmp_path / "config.json").read_text()) == PUBLISHED
    spec = load_spec(tmp_path)
    assert 79e9 < count_parameters(spec) < 83e9
    assert AutoConfig.from_pretrained(tmp_path).num_hidden_layers == 48
    assert AutoTokenizer.from_pretrained(tmp_path)("hi").input_ids == [104, 105]
    with pytest.raises(SettingsError, match="parameters"):
        write_random_checkpoint(tmp_path, "80b", weights=True)


def test_overrides_reach_the_config(tmp_path: Path) -> None:
    overrides: dict[str, Any] = {"num_hidden_layers": 2, "full_attention_interval": 2, "num_nextn_predict_layers": 0}
    write_random_checkpoint(tmp_path, "tiny", **overrides)
    spec = load_spec(tmp_path)
    assert spec.num_layers == 2 and spec.num_mtp_layers == 0
    assert not [name for name, _ in open_checkpoint(tmp_path) if name.startswith("mtp.")]


def test_shards_and_their_index(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((100,), float(i)) for i in range(5)}
    save_shards(tmp_path, iter(tensors.items()), shard_bytes=900)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 2000
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in open_checkpoint(tmp_path))


def test_what_cannot_be_made_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="shape: 'huge' is not known: use one of tiny"):
        write_random_checkpoint(tmp_path, "huge")
    with pytest.raises(SettingsError, match="dtype: 'int8' cannot be written"):
        write_random_checkpoint(tmp_path, "tiny", dtype="int8")
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        write_random_checkpoint(tmp_path, "tiny", num_experts_per_tok=9)
    assert not list(tmp_path.iterdir())
