"""Layers in packed integers on ranks: loaded from a checkpoint's tensors, their outputs are the dequantised layer's."""

from collections.abc import Iterable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.kernels.gemm.integer import dequantize_int8, quantize_int8_tokens
from qwen3next_plugin.kernels.moe import fused_moe
from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_integer import IntegerExperts, IntegerLinear, integer_layers
from qwen3next_plugin.layers_moe import SparseMoE
from qwen3next_plugin.reference.model import prepare_weights
from qwen3next_plugin.weights import fuse_checkpoint
from qwen3next_plugin.weights_loading import load_parameters
from tests.cpu.core.checkpoints import Tensors, packed_model
from tests.helpers import relative_error

SIZES: dict[str, Any] = {"moe_intermediate_size": 64, "shared_expert_intermediate_size": 64, "linear_num_key_heads": 4}
GDN, ATTENTION, MLP, FC = "model.layers.0.linear_attn", "model.layers.3.self_attn", "model.layers.0.mlp", "mtp.fc"


class Engines(nn.Module):
    """Stands for an engine's own layer, whose arguments it keeps."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__()
        self.options = options


@lru_cache
def made(kind: str) -> tuple[Qwen3NextSpec, Tensors]:
    return packed_model(kind, **SIZES)


def layers(spec: Qwen3NextSpec, rank: int = 0, size: int = 1, expert_parallel: bool = False) -> ParallelLayers:
    engine: dict[str, Any] = dict.fromkeys(("merged_column", "qkv", "row", "replicated", "silu_and_mul"), Engines)
    lent = ParallelLayers(
        rank, size, expert_parallel, "engine's", lambda prefix: 128, **engine, all_reduce=lambda x: x + 1000
    )
    return integer_layers(lent, spec)


def load(module: nn.Module, name: str, tensors: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec) -> Any:
    """The module, its parameters under ``name``, poisoned and loaded from the whole checkpoint."""
    for parameter in module.parameters():
        parameter.data.view(torch.uint8).fill_(0x7F)
    scope: Any = "mtp" if name.startswith("mtp.") else "model"
    prefix = name.replace("mtp.", "model.", 1)
    parameters = {f"{prefix}.{inner}": parameter for inner, parameter in module.named_parameters()}
    found = load_parameters(
        parameters, tensors, spec, scope, default_loader=lambda p, x: None, elsewhere=lambda n: n not in parameters
    )
    assert found == set(parameters), "every parameter was in the checkpoint"
    return module


@lru_cache
def whole(kind: str) -> dict[str, torch.Tensor]:
    """float64 weights of the model by their fused names."""
    spec, tensors = made(kind)
    return prepare_weights(fuse_checkpoint(tensors.items(), spec), torch.float64)


def rounded(x: torch.Tensor, kind: str) -> torch.Tensor:
    """Activations as the format's products see them, float64."""
    return dequantize_int8(*quantize_int8_tokens(x), torch.float64) if kind == "w8a8" else x.double()


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq-int8", "w4a16", "w8a16", "w8a8"])
def test_dense_layers_of_all_ranks_are_the_whole_layer(kind: str, size: int) -> None:
    spec, tensors = made(kind)
    gdn, attention = spec.gdn, spec.attention
    x = torch.randn(5, spec.hidden_size)
    y = torch.randn(5, gdn.value_dim)
    ins = [gdn.key_dim, gdn.key_dim, gdn.value_dim, gdn.value_dim]
    outputs, total = [], torch.zeros(5, spec.hidden_size, dtype=torch.float64)
    for rank in range(size):
        lent = layers(spec, rank, size)
        column = lent.merged_column(spec.hidden_size, ins, **lent.options(f"{GDN}.in_proj_qkvz"))
        load(column, f"{GDN}.in_proj_qkvz", tensors.items(), spec)
        outputs.append(column(x)[0].split([n // size for n in ins], dim=1))
        row = lent.row(gdn.value_dim, spec.hidden_size, reduce_results=False, **lent.options(f"{GDN}.out_proj"))
        load(row, f"{GDN}.out_proj", tensors.items(), spec)
        # A rank of W8A8 rounds its own columns of a token, as every tensor-parallel layer of this format does.
        mine = y.chunk(size, dim=1)[rank]
        expected = functional.linear(
            rounded(mine, kind), whole(kind)[f"{GDN}.out_proj.weight"].chunk(size, dim=1)[rank]
        )
        assert relative_error(row(mine)[0], expected) < 1e-5
        total += row(mine)[0].double()
        qkv = lent.qkv(
            spec.hidden_size,
            attention.head_dim,
            2 * attention.num_heads,
            attention.num_kv_heads,
            **lent.options(f"{ATTENTION}.qkv_proj"),
        )
        load(qkv, f"{ATTENTION}.qkv_proj", tensors.items(), spec)
        parts = functional.linear(rounded(x, kind), whole(kind)[f"{ATTENTION}.qkv_proj.weight"]).split(
            [n * attention.head_dim for n in (2 * attention.num_heads, *[attention.num_kv_heads] * 2)], dim=1
        )
        shown = torch.cat([part.chunk(min(size, n), dim=1)[rank * min(size, n) // size] for part, n in zip(
            parts, (size, attention.num_kv_heads, attention.num_kv_heads), strict=True
        )], dim=1)  # fmt: skip
        assert relative_error(qkv(x)[0], shown) < 1e-5
    flat = torch.cat([torch.cat(parts, dim=1) for parts in zip(*outputs, strict=True)], dim=1)
    expected = functional.linear(rounded(x, kind), whole(kind)[f"{GDN}.in_proj_qkvz.weight"])
    assert relative_error(flat, expected) < 1e-5
    exact = functional.linear(y.double(), whole(kind)[f"{GDN}.out_proj.weight"])
    assert relative_error(total, exact) < (2e-2 if kind == "w8a8" else 1e-5)


@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("kind", ["awq", "gptq", "w4a16", "w8a16", "w8a8"])
def test_experts_of_two_ranks_add_up(kind: str, expert_parallel: bool) -> None:
    spec, tensors = made(kind)
    x = torch.randn(9, spec.hidden_size)
    weights, ids = torch.rand(9, 2), torch.stack([torch.randperm(4)[:2] for _ in range(9)]).int()
    total = torch.zeros(9, spec.hidden_size, dtype=torch.float64)
    for rank in range(2):
        moe = SparseMoE(spec, layers(spec, rank, 2, expert_parallel), MLP)
        assert isinstance(moe.experts, IntegerExperts)
        load(moe.experts, f"{MLP}.experts", tensors.items(), spec)
        total += moe.experts(x, weights, ids).double()
    w13, w2 = whole(kind)[f"{MLP}.experts.w13"], whole(kind)[f"{MLP}.experts.w2"]
    expected = fused_moe(x.double(), w13, w2, weights, ids, backend="reference")
    assert relative_error(total, expected) < (3e-2 if kind == "w8a8" else 1e-5)


def test_the_ranks_are_summed_only_where_asked() -> None:
    spec, tensors = made("w4a16")
    for size, reduce, offset in ((2, True, 1000), (2, False, 0), (1, True, 0)):
        lent = layers(spec, 0, size)
        options = lent.options(f"{GDN}.out_proj")
        row = load(lent.row(128, 64, reduce_results=reduce, **options), f"{GDN}.out_proj", tensors.items(), spec)
        assert row(torch.zeros(2, 128 // size))[0].unique().tolist() == [offset]


def test_the_engine_builds_the_layers_that_are_not_quantised_without_its_quantisation() -> None:
    spec, _ = made("awq")
    lent = layers(spec)
    for module in (
        lent.merged_column(64, [8, 8], **lent.options(f"{GDN}.in_proj_ba")),
        lent.replicated(64, 4, **lent.options(f"{MLP}.gate")),
        lent.replicated(128, 64, **lent.options(FC)),
        lent.row(128, 64, **lent.options("mtp.layers.0.self_attn.o_proj")),
    ):
        assert isinstance(module, Engines) and module.options["quant_config"] is None
    assert lent.fp8_block(f"{MLP}.experts") is None
    bf16 = replace(spec, quant=None)
    assert layers(bf16).quant_config == "engine's" and layers(bf16).merged_column is Engines


def test_what_the_checkpoint_left_unquantised_runs_unquantised() -> None:
    """The config means the MTP layer too, the tools passed over it."""
    spec, tensors = made("gptq")
    lent = layers(spec)
    fc = lent.replicated(2 * spec.hidden_size, spec.hidden_size, **lent.options(FC))
    assert isinstance(fc, IntegerLinear)
    moe = SparseMoE(spec, lent, "mtp.layers.0.mlp")
    for module, name in ((fc, FC), (moe.experts, "mtp.layers.0.mlp.experts")):
        parameters = {
            f"{name.replace('mtp.', 'model.', 1)}.{inner}": parameter for inner, parameter in module.named_parameters()
        }
        load_parameters(
            parameters,
            tensors.items(),
            spec,
            "mtp",
            default_loader=lambda p, x: None,
            elsewhere=lambda n, known=parameters: n not in known,  # type: ignore[misc]
        )
        assert all(parameter.is_floating_point() for parameter in module.parameters())
    x = torch.randn(3, 2 * spec.hidden_size)
    assert torch.equal(fc(x)[0], functional.linear(x, tensors["mtp.fc.weight"]))
    y, weights, ids = torch.randn(3, spec.hidden_size), torch.rand(3, 2), torch.tensor([[0, 1], [2, 3], [1, 3]])
    w13, w2 = (whole("gptq")[f"mtp.layers.0.mlp.experts.{n}"] for n in ("w13", "w2"))
    expected = fused_moe(y.double(), w13, w2, weights, ids.int(), backend="reference")
    assert relative_error(moe.experts(y, weights, ids.int()), expected) < 1e-5


def plain(tensors: Tensors, module: str, *shape: int) -> Tensors:
    """The checkpoint with one module as it was before it was quantised."""
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(f"{module}.")}
    return kept | {f"{module}.weight": torch.rand(shape)}


@pytest.mark.parametrize(
    ("part", "shape", "sentence"),
    [
        ("3.self_attn.v_proj", (128, 64), r"qkv_proj\.weight would be made of torch.uint8 and torch.float32 parts"),
        ("0.mlp.experts.2.up_proj", (64, 64), r"experts\.w13 would be made of torch.uint8 and torch.float32 parts"),
        ("0.mlp.experts.2.down_proj", (64, 64), r"experts\.w2 (would be made of|holds torch.float32)"),
    ],
)
def test_a_half_quantised_layer_is_refused(part: str, shape: tuple[int, int], sentence: str) -> None:
    spec, tensors = made("w4a16")
    lent = layers(spec)
    module: nn.Module = SparseMoE(spec, lent, MLP).experts
    name = f"{MLP}.experts"
    if "self_attn" in part:
        attention, name = spec.attention, f"{ATTENTION}.qkv_proj"
        module = lent.qkv(64, attention.head_dim, 2 * attention.num_heads, attention.num_kv_heads, **lent.options(name))
    with pytest.raises(WeightError, match=sentence):
        load(module, name, plain(tensors, f"model.layers.{part}", *shape).items(), spec)
