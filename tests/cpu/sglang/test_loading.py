"""What a rank's parameters hold after loading, bf16 and FP8, and what a checkpoint that is not the model's leads to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.runtime_context import get_parallel

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.errors import PluginError, WeightError
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.layers_fp8 import Fp8Rows
from qwen3next_plugin.sglang_integration.gdn_layer import Qwen3NextGdnLayer
from qwen3next_plugin.sglang_integration.model import Qwen3NextForCausalLM
from qwen3next_plugin.sglang_integration.moe import fp8_block_size
from qwen3next_plugin.weights import Placement, fuse_checkpoint, open_checkpoint, shard_fused

from .in_process import model_config, start

# Heads, widths and the hidden size are whole FP8 blocks, on two ranks too.
BLOCKS: dict[str, Any] = {
    "hidden_size": 256,
    "head_dim": 128,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "moe_intermediate_size": 256,
    "shared_expert_intermediate_size": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@pytest.fixture(scope="module", params=["bfloat16", "fp8"])
def path(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("checkpoint")
    written = write_random_checkpoint(directory / "it", "tiny", fp8=request.param == "fp8", **BLOCKS)
    start(written, meeting=directory / "meeting")
    return written


def build(path: Path) -> Qwen3NextForCausalLM:
    """The model as SGLang constructs it, not loaded."""
    spec = load_spec(path)
    quant = None
    if spec.quant is not None:
        quant = Fp8Config(True, "dynamic", list(spec.quant.ignored), weight_block_size=[128, 128])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        return Qwen3NextForCausalLM(model_config(path).hf_config, quant)
    finally:
        torch.set_default_dtype(default)


def as_rank(rank: int, size: int) -> AbstractContextManager[Any]:
    """Layers built within are those of one rank of several; loading them takes no group that can communicate."""
    groups = ("tp", "attn_tp", "moe_tp")
    group = SimpleNamespace(rank_in_group=rank, world_size=size, cpu_group=None, device_group=None)
    values = {"rank": rank, "size": size, "group": group}
    return get_parallel().override(**{f"{group}_{name}": values[name] for group in groups for name in values})


def fp8_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.view(torch.uint8) if tensor.dtype is torch.float8_e4m3fn else tensor


@pytest.mark.parametrize(("rank", "size"), [(0, 1), (0, 2), (1, 2)])
def test_each_parameter_is_this_ranks_slice_of_the_fused_checkpoint(path: Path, rank: int, size: int) -> None:
    check_slices(path, rank, size)


@pytest.mark.usefixtures("path")
@pytest.mark.parametrize(("rank", "width"), [(0, 256), (3, 256), (3, 768)])
def test_slices_of_half_an_fp8_block(rank: int, width: int, tmp_path: Path) -> None:
    """Four ranks with 64 of 256 columns each, as eight have of the published 512: SGLang's own layers refuse them.

    A wider shared expert than the others cannot run as one of them, and is built of our layers.
    """
    sizes = BLOCKS | {"linear_num_key_heads": 4, "shared_expert_intermediate_size": width}
    written = write_random_checkpoint(tmp_path / "it", "tiny", fp8=True, **sizes)
    model = check_slices(written, rank, 4)
    shared = [module for name, module in model.named_modules() if name.endswith("shared_expert.down_proj")]
    assert shared and all(isinstance(module, Fp8Rows) == (width == 768) for module in shared)


def check_slices(path: Path, rank: int, size: int) -> Qwen3NextForCausalLM:
    """Build and load one rank's model, poisoned before, and compare each parameter with its slice."""
    spec = load_spec(path)
    with as_rank(rank, size):
        model = build(path)
        for parameter in model.parameters():
            fp8_bytes(parameter.data).fill_(0x7F)
        loaded = model.load_weights(open_checkpoint(path))
    shard = ExpertShard(spec, rank, size)
    fused = {name: x for name, x in fuse_checkpoint(open_checkpoint(path), spec).items() if not name.startswith("mtp.")}
    parameters = dict(model.named_parameters())
    assert loaded == set(fused)
    assert any(name.endswith("_scale_inv") for name in fused) == (spec.quant is not None)
    for name, whole in fused.items():
        found = parameters[name].data
        if ".experts." in name:
            expected = torch.empty_like(found[: shard.num_experts])  # the shared one lies behind, and has its own name
            shard.place(expected, whole, Placement(name))
        else:
            expected = shard_fused(name, whole, spec, rank, size).to(found.dtype)
        # The vocabulary is padded to whole slices.
        assert torch.equal(fp8_bytes(found[: len(expected)]), fp8_bytes(expected)), name
    return model


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda name, x: None if name == "model.layers.1.linear_attn.A_log" else (name, x), "A_log is not in"),
        (lambda name, x: (name, x[:-1] if name == "model.norm.weight" else x), "model.norm.weight has shape"),
        (
            lambda name, x: ("model.layers.0.mlp.bias" if name == "model.norm.weight" else name, x),
            "model.layers.0.mlp.bias is no tensor of this model",
        ),
    ],
)
def test_missing_misshapen_and_unknown_tensors_are_named(path: Path, change: Any, sentence: str) -> None:
    def changed() -> Iterator[tuple[str, torch.Tensor]]:
        yield from filter(None, (change(name, x) for name, x in open_checkpoint(path)))

    with pytest.raises(WeightError, match=sentence):
        build(path).load_weights(changed())


def test_experts_of_an_ignored_module_are_not_quantised() -> None:
    ignoring = Fp8Config(True, "dynamic", ["model.layers.3.mlp.experts"], weight_block_size=[128, 128])
    assert fp8_block_size(ignoring, "model.layers.3.mlp.experts") is None
    assert fp8_block_size(ignoring, "model.layers.2.mlp.experts") == 128
    assert fp8_block_size(None, "model.layers.2.mlp.experts") is None


@pytest.mark.parametrize("block", [None, [64, 64]])
def test_other_experts_are_refused(block: list[int] | None) -> None:
    quant = Fp8Config(True, "dynamic", weight_block_size=block)
    with pytest.raises(PluginError, match="model.layers.2.mlp.experts is stored as fp8.*stock SGLang"):
        fp8_block_size(quant, "model.layers.2.mlp.experts")


def test_what_the_recurrent_layer_hands_to_sglang_are_its_own_parameters(path: Path) -> None:
    model = build(path)
    layers = [module for module in model.modules() if isinstance(module, Qwen3NextGdnLayer)]
    assert layers
    for layer in layers:
        given = layer.attn.core_parameters()
        assert given.conv_weight is layer.conv1d.weight and given.norm_weight is layer.norm.weight
        assert given.A_log is layer.A_log and given.dt_bias is layer.dt_bias
        assert given.A_log.dtype is given.dt_bias.dtype is torch.float32
        assert given.conv_weight.shape == (load_spec(path).gdn.conv_dim, 4)
