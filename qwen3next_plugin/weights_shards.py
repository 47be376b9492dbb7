"""Slices of the fused tensors for tensor parallelism, by heads where a tensor is made of heads.

Every slice is a choice of rows or columns, so that the FP8 block scales follow from the same choice.
"""

import re
from dataclasses import dataclass

import torch

from .errors import WeightError
from .spec import Qwen3NextSpec
from .weights_layout import take_block_scales, take_rows
from .weights_map import SCALE_SUFFIX, Placement

_PREFIX = re.compile(r"(model|mtp)\.layers\.\d+\.")


@dataclass(frozen=True)
class _Section:
    """Part of a dimension: ``units`` heads (or single rows) of ``width`` rows each; ``field`` counts the units."""

    shard: str | None
    field: str
    units: int
    width: int = 1
    # KV heads: with more ranks than heads, neighbouring ranks hold the same head.
    replicable: bool = False


@dataclass(frozen=True)
class _Rule:
    dim: int
    sections: tuple[_Section, ...]


def _rules(spec: Qwen3NextSpec) -> dict[str, _Rule]:
    """How each fused tensor is cut, by name below the layer; a name that is not here is replicated."""
    gdn, attention, moe = spec.gdn, spec.attention, spec.moe
    key = _Section(None, "linear_num_key_heads", gdn.num_k_heads, gdn.head_k_dim)
    value = _Section(None, "linear_num_value_heads", gdn.num_v_heads, gdn.head_v_dim)
    value_heads = _Section(None, "linear_num_value_heads", gdn.num_v_heads)
    # q_proj holds the query and its output gate, head by head.
    query = _Section("q", "num_attention_heads", attention.num_heads, 2 * attention.head_dim)
    output = _Section(None, "num_attention_heads", attention.num_heads, attention.head_dim)
    keys = _Section("k", "num_key_value_heads", attention.num_kv_heads, attention.head_dim, replicable=True)
    values = _Section("v", "num_key_value_heads", attention.num_kv_heads, attention.head_dim, replicable=True)
    vocab = _Rule(-2, (_Section(None, "vocab_size", spec.vocab_size),))
    rules = {
        "linear_attn.in_proj_qkvz.weight": _Rule(-2, (key, key, value, value)),
        "linear_attn.in_proj_ba.weight": _Rule(-2, (value_heads, value_heads)),
        "linear_attn.conv1d.weight": _Rule(-2, (key, key, value)),
        "linear_attn.A_log": _Rule(-1, (value_heads,)),
        "linear_attn.dt_bias": _Rule(-1, (value_heads,)),
        "linear_attn.out_proj.weight": _Rule(-1, (value,)),
        "self_attn.qkv_proj.weight": _Rule(-2, (query, keys, values)),
        "self_attn.o_proj.weight": _Rule(-1, (output,)),
        "model.embed_tokens.weight": vocab,
        "lm_head.weight": vocab,
    }
    for up, down, field, width in (
        ("mlp.experts.w13", "mlp.experts.w2", "moe_intermediate_size", moe.intermediate_size),
        (
            "mlp.shared_expert.gate_up_proj.weight",
            "mlp.shared_expert.down_proj.weight",
            "shared_expert_intermediate_size",
            moe.shared_intermediate_size,
        ),
        ("mlp.gate_up_proj.weight", "mlp.down_proj.weight", "intermediate_size", spec.intermediate_size),
    ):
        rules[up] = _Rule(-2, (_Section("gate", field, width), _Section("up", field, width)))
        rules[down] = _Rule(-1, (_Section(None, field, width),))
    return rules


def shard_fused(
    placement: Placement | str, tensor: torch.Tensor, spec: Qwen3NextSpec, rank: int, size: int
) -> torch.Tensor:
    """The slice of a fused tensor, or of one part of it, that tensor-parallel rank ``rank`` of ``size`` holds.

    ``placement`` is what `fused_stream` yielded beside ``tensor``, or the fused name of a whole tensor; block scales go
    by their own names. q, k, v, z, b and a are each cut by heads; with more ranks than KV heads a KV head goes to
    several ranks. Replicated tensors (norms, routers, ``mtp.fc``) come back as they are, others as copies. Raises
    WeightError where ``size`` does not divide the heads or widths, or would cut through an FP8 block.
    """
    if isinstance(placement, str):
        placement = Placement(placement)
    if not 0 <= rank < size:
        raise WeightError(f"tensor-parallel rank {rank} is outside 0 to {size - 1}: give a rank below the size.")
    weight = placement.name.removesuffix(SCALE_SUFFIX)
    rule = _rules(spec).get(_PREFIX.sub("", weight))
    if rule is None or size == 1:
        return tensor
    rows = _rows(rule, placement.shard, rank, size)
    if weight == placement.name:
        return take_rows(tensor, rows, rule.dim)
    block = spec.quant.weight_block_size if spec.quant is not None else None
    if block is None:
        raise WeightError(
            f"{placement.name} has no block size in config.json: add quantization_config.weight_block_size."
        )
    return take_block_scales(tensor, rows, block[rule.dim], weight, rule.dim)


def _rows(rule: _Rule, shard: str | None, rank: int, size: int) -> torch.Tensor:
    """int64: the rows (along ``rule.dim``) of the tensor, or of its part ``shard``, that go to ``rank``."""
    rows, offset = [], 0
    for section in rule.sections:
        if shard is not None and section.shard != shard:
            continue
        first, count = _units(section, rank, size)
        start = offset + first * section.width
        rows.append(torch.arange(start, start + count * section.width, device="cpu"))
        offset += section.units * section.width
    return torch.cat(rows)


def _units(section: _Section, rank: int, size: int) -> tuple[int, int]:
    """First unit and number of units of a section for ``rank``."""
    if section.units % size == 0:
        count = section.units // size
        return rank * count, count
    if section.replicable and size % section.units == 0:
        return rank * section.units // size, 1
    sizes = [str(n) for n in range(1, min(section.units, 64) + 1) if section.units % n == 0]
    raise WeightError(
        f"tensor-parallel size {size} does not divide {section.field} ({section.units}): use one of {', '.join(sizes)}."
    )


def check_tensor_parallel(spec: Qwen3NextSpec, size: int) -> None:
    """Raise WeightError if the model's layers cannot be cut for ``size`` ranks; the vocabulary is padded by engines."""
    for name, rule in _rules(spec).items():
        if name.startswith(("model.", "lm_head.")) or (name.startswith("mlp.gate_up") and not spec.dense_layers):
            continue
        if name.startswith("mlp.down") and not spec.dense_layers:
            continue
        _rows(rule, None, 0, size)
