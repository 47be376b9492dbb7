"""Random checkpoints in the published naming, made from a spec by a second, independent list of names and shapes."""

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch

from qwen3next_plugin.config import LayerKind, Qwen3NextSpec, parse_config
from qwen3next_plugin.demo.random import random_tensors
from qwen3next_plugin.demo.shapes import config_of
from tests.configs import new_form

Tensors = dict[str, torch.Tensor]


def small_spec(**changes: Any) -> Qwen3NextSpec:
    return parse_config(new_form(**changes))


def fp8_spec(block: int = 16, **changes: Any) -> Qwen3NextSpec:
    quant = {"quant_method": "fp8", "weight_block_size": [block, block], "activation_scheme": "dynamic"}
    return small_spec(quantization_config=quant, **changes)


def published_shapes(spec: Qwen3NextSpec, mtp: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as in Qwen/Qwen3-Next-80B-A3B-Instruct, scaled to ``spec``."""
    h, gdn, att, moe = spec.hidden_size, spec.gdn, spec.attention, spec.moe
    yield "model.embed_tokens.weight", (spec.vocab_size, h)
    yield "model.norm.weight", (h,)
    if not spec.tie_word_embeddings:
        yield "lm_head.weight", (spec.vocab_size, h)
    layers = [(f"model.layers.{i}", kind, i in spec.dense_layers) for i, kind in enumerate(spec.layer_kinds)]
    if mtp:
        yield "mtp.fc.weight", (h, 2 * h)
        for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
            yield f"mtp.{name}.weight", (h,)
        layers.append(("mtp.layers.0", LayerKind.FULL, False))
    for layer, kind, dense in layers:
        yield f"{layer}.input_layernorm.weight", (h,)
        yield f"{layer}.post_attention_layernorm.weight", (h,)
        if kind is LayerKind.LINEAR:
            mixer = f"{layer}.linear_attn"
            per_group = 2 * gdn.head_k_dim + 2 * gdn.heads_per_group * gdn.head_v_dim
            yield f"{mixer}.in_proj_qkvz.weight", (gdn.num_k_heads * per_group, h)
            yield f"{mixer}.in_proj_ba.weight", (2 * gdn.num_v_heads, h)
            yield f"{mixer}.conv1d.weight", (2 * gdn.key_dim + gdn.value_dim, 1, gdn.conv_kernel_size)
            yield f"{mixer}.A_log", (gdn.num_v_heads,)
            yield f"{mixer}.dt_bias", (gdn.num_v_heads,)
            yield f"{mixer}.norm.weight", (gdn.head_v_dim,)
            yield f"{mixer}.out_proj.weight", (h, gdn.num_v_heads * gdn.head_v_dim)
        else:
            mixer = f"{layer}.self_attn"
            yield f"{mixer}.q_proj.weight", (2 * att.num_heads * att.head_dim, h)
            yield f"{mixer}.k_proj.weight", (att.num_kv_heads * att.head_dim, h)
            yield f"{mixer}.v_proj.weight", (att.num_kv_heads * att.head_dim, h)
            yield f"{mixer}.o_proj.weight", (h, att.num_heads * att.head_dim)
            yield f"{mixer}.q_norm.weight", (att.head_dim,)
            yield f"{mixer}.k_norm.weight", (att.head_dim,)
        if dense:
            yield from _mlp(f"{layer}.mlp", h, spec.intermediate_size)
            continue
        yield f"{layer}.mlp.gate.weight", (moe.num_experts, h)
        yield f"{layer}.mlp.shared_expert_gate.weight", (1, h)
        yield from _mlp(f"{layer}.mlp.shared_expert", h, moe.shared_intermediate_size)
        for expert in range(moe.num_experts):
            yield from _mlp(f"{layer}.mlp.experts.{expert}", h, moe.intermediate_size)


def _mlp(prefix: str, h: int, width: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{prefix}.gate_proj.weight", (width, h)
    yield f"{prefix}.up_proj.weight", (width, h)
    yield f"{prefix}.down_proj.weight", (h, width)


def random_checkpoint(spec: Qwen3NextSpec, mtp: bool = True, dtype: torch.dtype = torch.bfloat16) -> Tensors:
    return {name: torch.randn(shape).to(dtype) for name, shape in published_shapes(spec, mtp)}


_IN_FP8 = ("_proj.weight", "in_proj_qkvz.weight", "mtp.fc.weight")


def fp8_checkpoint(spec: Qwen3NextSpec, mtp: bool = True) -> Tensors:
    """Linear layers in FP8 with one random scale a block, the rest in bf16, as the published FP8 checkpoint has it."""
    assert spec.quant is not None and spec.quant.weight_block_size is not None
    tensors: Tensors = {}
    for name, tensor in random_checkpoint(spec, mtp).items():
        if not name.endswith(_IN_FP8):
            tensors[name] = tensor
            continue
        blocks = [-(-n // b) for n, b in zip(tensor.shape, spec.quant.weight_block_size, strict=True)]
        tensors[name] = tensor.to(torch.float8_e4m3fn)
        tensors[name + "_scale_inv"] = torch.rand(blocks).to(torch.bfloat16)
    return tensors


def dequantised(weight: torch.Tensor, scale_inv: torch.Tensor, block: int) -> torch.Tensor:
    """float32 weight [.., rows, columns] times its block's scale."""
    wide = scale_inv.float().repeat_interleave(block, -2).repeat_interleave(block, -1)
    return weight.float() * wide[..., : weight.shape[-2], : weight.shape[-1]]


def stacked(tensors: Tensors, spec: Qwen3NextSpec) -> Tensors:
    """The same checkpoint with experts as transformers 5 holds them."""
    out = {name: tensor for name, tensor in tensors.items() if ".mlp.experts." not in name}
    prefixes = {name.split("experts.")[0] + "experts." for name in tensors if ".mlp.experts." in name}
    for prefix in prefixes:
        for suffix in ("", "_scale_inv"):
            if f"{prefix}0.gate_proj.weight{suffix}" not in tensors:
                continue
            experts = [
                [tensors[f"{prefix}{j}.{part}_proj.weight{suffix}"] for part in ("gate", "up", "down")]
                for j in range(spec.moe.num_experts)
            ]
            out[f"{prefix}gate_up_proj{suffix}"] = torch.stack([torch.cat([gate, up]) for gate, up, _ in experts])
            out[f"{prefix}down_proj{suffix}"] = torch.stack([down for _, _, down in experts])
    return out


@lru_cache
def _packed(kind: str) -> tuple[Qwen3NextSpec, Tensors]:
    spec = parse_config(config_of("tiny", "float32", quantization=kind, num_experts=4))
    return spec, dict(random_tensors(spec, 0))


def packed_model(kind: str, **changes: Any) -> tuple[Qwen3NextSpec, Tensors]:
    """A spec and its random checkpoint in packed integers, of one of `shapes.QUANTISATIONS`; it may be changed."""
    if not changes:
        return _packed(kind)[0], dict(_packed(kind)[1])
    spec = parse_config(config_of("tiny", "float32", quantization=kind, num_experts=4, **changes))
    return spec, dict(random_tensors(spec, 0))
