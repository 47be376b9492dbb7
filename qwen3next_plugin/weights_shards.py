"""Slices of the fused tensors for tensor parallelism, by heads where a tensor is made of heads.

Every slice is a choice of rows or columns, so that FP8 block scales, and the scales and zero points of integer codes,
follow from the same choice.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from math import gcd

import torch

from . import weights_packed
from .config_quant import MIN_GROUP
from .errors import WeightError
from .spec import IntegerFormat, LayerKind, Qwen3NextSpec
from .weights_layout import take_block_scales, take_rows
from .weights_map import SCALE_SUFFIX
from .weights_sources import Placement

MIN_BLOCK = 32  # the depth of one FP8 tensor-core instruction: a finer factor could not be applied between two

_PREFIX = re.compile(r"(model|mtp)\.layers\.\d+\.")
_BESIDE = re.compile(f"({SCALE_SUFFIX}|{weights_packed.SCALE_SUFFIX}|{weights_packed.ZERO_SUFFIX})$")


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
    several ranks. Replicated tensors (norms, routers, ``mtp.fc``) come back as they are, others as copies. Where a cut
    goes through an FP8 block, the factors come back on the finer grid of `scale_block`, so that no value changes.
    Raises WeightError where ``size`` does not divide the heads or widths, or would cut FP8 blocks below `MIN_BLOCK`.
    """
    if isinstance(placement, str):
        placement = Placement(placement)
    if not 0 <= rank < size:
        raise WeightError(f"tensor-parallel rank {rank} is outside 0 to {size - 1}: give a rank below the size.")
    weight = _BESIDE.sub("", placement.name)
    rule = _rules(spec).get(_PREFIX.sub("", weight))
    if rule is None or size == 1:
        return tensor
    rows = _rows(rule, placement.shard, rank, size)
    if weight != placement.name and not placement.name.endswith(SCALE_SUFFIX):
        return _take_groups(tensor, rows, rule, size, weight)
    if weight == placement.name:
        # Of integer codes of 4 bits, a byte holds two columns.
        return take_rows(tensor, rows[::2] // 2 if tensor.dtype == torch.uint8 and rule.dim == -1 else rows, rule.dim)
    block = spec.quant.weight_block_size if spec.quant is not None else None
    if block is None:
        raise WeightError(
            f"{placement.name} has no block size in config.json: add quantization_config.weight_block_size."
        )
    finer = _scale_block(rule, size, block[rule.dim])
    return take_block_scales(tensor, rows, block[rule.dim], weight, rule.dim, finer)


def _take_groups(tensor: torch.Tensor, rows: torch.Tensor, rule: _Rule, size: int, weight: str) -> torch.Tensor:
    """The scales or zero points [.., N, groups] of the rows, or of the columns, that a rank holds."""
    if rule.dim == -2:
        return take_rows(tensor, rows, -2)
    columns = sum(section.units * section.width for section in rule.sections)
    group = columns // tensor.shape[-1]
    return take_block_scales(tensor, rows, group, weight, -1, _scale_group(rule, size, group))


def _scale_group(rule: _Rule, size: int, group: int) -> int:
    """Columns of a rank for one scale of integer codes, where the checkpoint has one for ``group``."""
    finer = scale_block(group, *(width for _, width in _widths(rule, size)))
    if finer < MIN_GROUP:
        section, width = next(_widths(rule, size))
        raise WeightError(
            f"tensor-parallel size {size} leaves {width} columns of {section.field} ({section.units * section.width}) "
            f"to a rank, in groups of {finer} of one scale: use a smaller size, which leaves groups of {MIN_GROUP}."
        )
    return finer


def scale_block(block: int, *widths: int) -> int:
    """Rows (or columns) for one factor in a rank's slice of tensors that have one for every ``block`` of them.

    ``widths`` are those of the slice's sections. ``block`` itself where each ends on a block, else the largest size
    that divides them all: a 128-block cut in the middle leaves two ranks 64-blocks with one and the same factor.
    """
    return block if all(width % block == 0 for width in widths) else gcd(block, *widths)


def _scale_block(rule: _Rule, size: int, block: int) -> int:
    finer = scale_block(block, *(width for _, width in _widths(rule, size)))
    if finer < min(block, MIN_BLOCK):
        raise _cut_blocks(rule, size, block, MIN_BLOCK)
    return finer


def _widths(rule: _Rule, size: int) -> Iterator[tuple[_Section, int]]:
    """Each section with the rows (columns) of it that one rank holds."""
    for section in rule.sections:
        yield section, _units(section, 0, size)[1] * section.width


def _cut_blocks(rule: _Rule, size: int, block: int, multiple: int) -> WeightError:
    """The error for slices that FP8 blocks of ``block`` cannot be cut to, being no multiples of ``multiple``."""
    section, width = next((s, width) for s, width in _widths(rule, size) if width % multiple)
    return WeightError(
        f"tensor-parallel size {size} leaves {width} rows or columns of {section.field} "
        f"({section.units * section.width}) to a rank, which is no multiple of {multiple} as FP8 blocks of {block} "
        "need here: use a smaller size, or an unquantised checkpoint."
    )


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
    """Raise WeightError if the model's layers cannot be cut for ``size`` ranks; the vocabulary is padded by engines.

    In FP8 blocks, the attention's and Gated DeltaNet's projections are the engines' own layers, which take whole blocks
    only (both raise ValueError otherwise, without the field's name); MLPs and experts are cut as `scale_block` says.
    """
    block = spec.quant.weight_block_size if spec.quant is not None else None
    for name, rule in _rules(spec).items():
        if name.startswith(("model.", "lm_head.")) or not _layers_with(name, spec):
            continue
        _rows(rule, None, 0, size)
        if size > 1 and rule.dim == -1:
            for stored in _integer_formats(name, spec):
                columns = sum(section.units * section.width for section in rule.sections)
                _scale_group(rule, size, stored.group_size or columns)
        if block is None or size == 1 or not _quantised(name, spec):
            continue
        if name.startswith("mlp."):
            _scale_block(rule, size, block[rule.dim])
        elif any(width % block[rule.dim] for _, width in _widths(rule, size)):
            raise _cut_blocks(rule, size, block[rule.dim], block[rule.dim])


# The checkpoint's module behind a fused name, where they differ; of parts, all are quantised or none.
_PARTS = {"qkv_proj": "q_proj", "gate_up_proj": "gate_proj", "experts.w13": "experts.0.gate_proj",
          "experts.w2": "experts.0.down_proj"}  # fmt: skip


def _layers_with(name: str, spec: Qwen3NextSpec) -> list[str]:
    """The prefixes of the decoder layers that have this tensor: lists of ignored modules name it in those only."""

    def has(layer: int) -> bool:
        if name.startswith("mlp."):
            return name.startswith(("mlp.gate_up_proj", "mlp.down_proj")) == (layer in spec.dense_layers)
        mixer = "linear_attn." if spec.layer_kinds[layer] is LayerKind.LINEAR else "self_attn."
        return name.startswith(mixer) or not name.startswith(("linear_attn.", "self_attn."))

    return [f"model.layers.{layer}." for layer in range(spec.num_layers) if has(layer)]


def _quantised(name: str, spec: Qwen3NextSpec) -> bool:
    """Whether a layer of ``spec``, which has a quantisation, has this fused tensor in FP8."""
    assert spec.quant is not None
    module = _module_behind(name)
    return module is not None and not all(spec.quant.is_ignored(layer + module) for layer in _layers_with(name, spec))


def _module_behind(name: str) -> str | None:
    """The checkpoint's module, or the first of them, that makes up a fused tensor; None for one never quantised."""
    module = name.removesuffix(".weight")
    if module.endswith(("conv1d", "A_log", "dt_bias")):
        return None
    for fused, part in _PARTS.items():
        module = module.removesuffix(fused) + part if module.endswith(fused) else module
    return module


def integer_format(module: str, spec: Qwen3NextSpec) -> IntegerFormat | None:
    """How the config says that the fused module of this name (``...qkv_proj``, ``...experts.w13``) is stored."""
    behind = _module_behind(module)
    return spec.quant.integer_format(behind) if spec.quant is not None and behind is not None else None


def _integer_formats(name: str, spec: Qwen3NextSpec) -> set[IntegerFormat]:
    """The formats that layers have this fused tensor in."""
    found = (integer_format(layer + name, spec) for layer in _layers_with(name, spec))
    return {stored for stored in found if stored is not None}
