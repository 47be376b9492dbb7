"""Where each tensor of a checkpoint goes: checkpoint names to fused names, with the shapes a config demands."""

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Literal, NamedTuple

from .errors import WeightError
from .spec import LayerKind, Qwen3NextSpec

SCALE_SUFFIX = "_scale_inv"
Scope = Literal["all", "model", "mtp"]

_LAYER = re.compile(r"(model|mtp)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
# A full-attention layer with experts, whatever layer 0 of the decoder is.
_MTP_LAYER = (LayerKind.FULL, False)
_EXPERT_PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class Placement(NamedTuple):
    """The place of one checkpoint tensor in the fused weights.

    ``shard`` is None for a whole tensor, else which part of it: "q", "k", "v" of ``qkv_proj``, "gate" or "up" of
    ``gate_up_proj`` and ``experts.w13``. ``expert`` is None for tensors without experts and for stacked experts.
    """

    name: str
    shard: str | None = None
    expert: int | None = None


class Source(NamedTuple):
    """What a checkpoint tensor must look like and where it goes.

    ``shape`` is the checkpoint tensor's, ``fused_shape`` that of the whole fused tensor, and ``offset`` the first row
    (of dim -2) this part takes in it. ``relayout`` names the change of layout on the way, if any.
    """

    placement: Placement
    shape: tuple[int, ...]
    fused_shape: tuple[int, ...]
    offset: int = 0
    relayout: Literal["qkvz", "ba", "conv", "float32"] | None = None

    @property
    def whole(self) -> bool:
        """Whether this tensor alone makes up the fused one."""
        return self.placement.shard is None and self.placement.expert is None


class TensorMap:
    """Every checkpoint tensor a model may have, by name, and what becomes of it."""

    def __init__(self, spec: Qwen3NextSpec) -> None:
        self.spec = spec
        self._top = _top_sources(spec)
        self._decoder = [(kind, index in spec.dense_layers) for index, kind in enumerate(spec.layer_kinds)]
        self._layers = {layer: _layer_sources(spec, *layer) for layer in {*self._decoder, _MTP_LAYER}}

    def locate(self, name: str) -> Source | None:
        """The source of a checkpoint tensor, block scales included; None for a name this model does not have.

        Raises WeightError for a block scale that the config or the model's sizes leave no meaning for.
        """
        if name.endswith(SCALE_SUFFIX):
            weight = self.locate(name.removesuffix(SCALE_SUFFIX))
            return None if weight is None else _scale_source(name, weight, self.spec)
        match = _LAYER.fullmatch(name)
        if match is None:
            return self._top.get(name)
        tree, index, inner = match[1], int(match[2]), match[3]
        layers = self._layers_of(tree)
        if index >= len(layers):
            return None
        expert = None
        found = _EXPERT.fullmatch(inner)
        if found is not None:
            expert, inner = int(found[1]), f"mlp.experts.*.{found[2]}"
            if expert >= self.spec.moe.num_experts:
                return None
        source = self._layers[layers[index]].get(inner)
        if source is None:
            return None
        placement = Placement(f"{tree}.layers.{index}.{source.placement.name}", source.placement.shard, expert)
        return source._replace(placement=placement)

    def _layers_of(self, tree: str) -> list[tuple[LayerKind, bool]]:
        """(mixer, whether dense) of the layers of ``model`` or ``mtp``."""
        return [_MTP_LAYER] if tree == "mtp" else self._decoder

    def first_missing(self, names: AbstractSet[str], scope: Scope = "all") -> str | None:
        """The first weight (block scales aside) the model needs in ``scope`` that is not among ``names``.

        MTP weights count as needed if config.json says so, if ``names`` has some, or if ``scope`` is "mtp".
        """
        wants_mtp = scope == "mtp" or self.spec.num_mtp_layers > 0 or any(name.startswith("mtp.") for name in names)
        for name in self._needed(names, wants_mtp):
            if in_scope(name, scope) and name not in names:
                return name
        return None

    def _needed(self, names: AbstractSet[str], wants_mtp: bool) -> Iterator[str]:
        yield from (name for name in self._top if wants_mtp or not name.startswith("mtp."))
        layers = [(f"model.layers.{i}.", layer) for i, layer in enumerate(self._layers_of("model"))]
        if wants_mtp:
            layers.append(("mtp.layers.0.", _MTP_LAYER))
        for prefix, layer in layers:
            yield from (prefix + name for name in self._layers[layer] if not name.startswith("mlp.experts."))
            _, dense = layer
            if dense:
                continue
            stacked = (prefix + "mlp.experts.gate_up_proj", prefix + "mlp.experts.down_proj")
            if not names.isdisjoint(stacked):
                yield from stacked
                continue
            for expert in range(self.spec.moe.num_experts):
                yield from (f"{prefix}mlp.experts.{expert}.{part}" for part in _EXPERT_PARTS)


def _top_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    h, table = spec.hidden_size, (spec.vocab_size, spec.hidden_size)
    sources = [
        _whole("model.embed_tokens.weight", *table),
        _whole("model.norm.weight", h),
        _whole("mtp.fc.weight", h, 2 * h),
        _whole("mtp.norm.weight", h),
        _whole("mtp.pre_fc_norm_embedding.weight", h),
        _whole("mtp.pre_fc_norm_hidden.weight", h),
    ]
    if not spec.tie_word_embeddings:
        sources.insert(2, _whole("lm_head.weight", *table))
    return {source.placement.name: source for source in sources}


def _layer_sources(spec: Qwen3NextSpec, kind: LayerKind, dense: bool) -> dict[str, Source]:
    """The tensors of one layer by name below its prefix; ``*`` stands for the expert."""
    h = spec.hidden_size
    sources = {name: _whole(name, h) for name in ("input_layernorm.weight", "post_attention_layernorm.weight")}
    sources |= _gdn_sources(spec) if kind is LayerKind.LINEAR else _attention_sources(spec)
    if dense:
        sources |= _mlp_sources("mlp.", h, spec.intermediate_size)
    else:
        sources |= _moe_sources(spec)
    return sources


def _whole(name: str, *shape: int) -> Source:
    return Source(Placement(name), shape, shape)


def _gdn_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    gdn, h = spec.gdn, spec.hidden_size
    heads, conv = (gdn.num_v_heads,), (gdn.conv_dim, gdn.conv_kernel_size)
    qkvz, ba = (2 * gdn.key_dim + 2 * gdn.value_dim, h), (2 * gdn.num_v_heads, h)
    sources = [
        Source(Placement("in_proj_qkvz.weight"), qkvz, qkvz, relayout="qkvz"),
        Source(Placement("in_proj_ba.weight"), ba, ba, relayout="ba"),
        Source(Placement("conv1d.weight"), (conv[0], 1, conv[1]), conv, relayout="conv"),
        Source(Placement("A_log"), heads, heads, relayout="float32"),
        Source(Placement("dt_bias"), heads, heads, relayout="float32"),
        _whole("norm.weight", gdn.head_v_dim),
        _whole("out_proj.weight", h, gdn.value_dim),
    ]
    return {f"linear_attn.{s.placement.name}": _below("linear_attn.", s) for s in sources}


def _below(prefix: str, source: Source) -> Source:
    return source._replace(placement=source.placement._replace(name=prefix + source.placement.name))


def _attention_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    attention, h = spec.attention, spec.hidden_size
    # q_proj holds the output gate as well: per head, first q, then the gate.
    query = 2 * attention.num_heads * attention.head_dim
    key = attention.num_kv_heads * attention.head_dim
    fused = (query + 2 * key, h)
    name = "self_attn.qkv_proj.weight"
    return {
        "self_attn.q_proj.weight": Source(Placement(name, "q"), (query, h), fused),
        "self_attn.k_proj.weight": Source(Placement(name, "k"), (key, h), fused, query),
        "self_attn.v_proj.weight": Source(Placement(name, "v"), (key, h), fused, query + key),
        "self_attn.o_proj.weight": _whole("self_attn.o_proj.weight", h, query // 2),
        "self_attn.q_norm.weight": _whole("self_attn.q_norm.weight", attention.head_dim),
        "self_attn.k_norm.weight": _whole("self_attn.k_norm.weight", attention.head_dim),
    }


def _mlp_sources(prefix: str, h: int, width: int) -> dict[str, Source]:
    fused, name = (2 * width, h), f"{prefix}gate_up_proj.weight"
    return {
        f"{prefix}gate_proj.weight": Source(Placement(name, "gate"), (width, h), fused),
        f"{prefix}up_proj.weight": Source(Placement(name, "up"), (width, h), fused, width),
        f"{prefix}down_proj.weight": _whole(f"{prefix}down_proj.weight", h, width),
    }


def _moe_sources(spec: Qwen3NextSpec) -> dict[str, Source]:
    moe, h = spec.moe, spec.hidden_size
    width = moe.intermediate_size
    w13, w2 = (moe.num_experts, 2 * width, h), (moe.num_experts, h, width)
    up, down = Placement("mlp.experts.w13", "up"), Placement("mlp.experts.w2")
    return {
        "mlp.gate.weight": _whole("mlp.gate.weight", moe.num_experts, h),
        "mlp.shared_expert_gate.weight": _whole("mlp.shared_expert_gate.weight", 1, h),
        **_mlp_sources("mlp.shared_expert.", h, moe.shared_intermediate_size),
        # As published, one tensor an expert.
        "mlp.experts.*.gate_proj.weight": Source(Placement("mlp.experts.w13", "gate"), (width, h), w13),
        "mlp.experts.*.up_proj.weight": Source(up, (width, h), w13, width),
        "mlp.experts.*.down_proj.weight": Source(down, (h, width), w2),
        # As transformers 5 holds them, all experts in one tensor.
        "mlp.experts.gate_up_proj": Source(Placement("mlp.experts.w13"), w13, w13),
        "mlp.experts.down_proj": Source(down, w2, w2),
    }


def _scale_source(name: str, weight: Source, spec: Qwen3NextSpec) -> Source:
    block = spec.quant.weight_block_size if spec.quant is not None else None
    if block is None:
        raise WeightError(
            f"{name} is in the checkpoint, but config.json has no quantization_config with a weight_block_size: "
            "take the config.json that belongs to this checkpoint."
        )
    if len(weight.shape) < 2 or weight.relayout == "conv":
        raise WeightError(
            f"{name} is in the checkpoint, but this tensor is never quantised: fetch the checkpoint again."
        )
    if weight.placement.shard is not None and (weight.offset % block[0] or weight.shape[-2] % block[0]):
        raise WeightError(
            f"{name.removesuffix(SCALE_SUFFIX)} has {weight.shape[-2]} rows, which FP8 blocks of {block[0]} do not "
            f"divide: use sizes that are multiples of {block[0]}, or an unquantised checkpoint."
        )

    def blocks(shape: tuple[int, ...]) -> tuple[int, ...]:
        return (*shape[:-2], -(-shape[-2] // block[0]), -(-shape[-1] // block[1]))

    placement = weight.placement._replace(name=weight.placement.name + SCALE_SUFFIX)
    relayout = weight.relayout
    return Source(placement, blocks(weight.shape), blocks(weight.fused_shape), weight.offset // block[0], relayout)


def in_scope(name: str, scope: Scope) -> bool:
    """Whether a checkpoint tensor is read for the decoder ("model") or the drafter ("mtp": embedding and head too)."""
    if scope == "mtp":
        return name.startswith(("mtp.", "model.embed_tokens.", "lm_head."))
    return scope == "all" or not name.startswith("mtp.")


def is_ignored(name: str, spec: Qwen3NextSpec) -> bool:
    """Tensors some checkpoints carry that say nothing new: rotary frequencies, and a head tied to the embedding."""
    return name.endswith(".rotary_emb.inv_freq") or (spec.tie_word_embeddings and name == "lm_head.weight")


def missing_tensor(name: str) -> WeightError:
    """The error for a tensor that should be in the checkpoint."""
    return WeightError(f"{name} is not in the checkpoint: fetch it again, or take the config.json that belongs to it.")


def wrong_shape(name: str, shape: tuple[int, ...], source: Source) -> WeightError:
    """The error for a checkpoint tensor of another shape than the config makes it."""
    return WeightError(
        f"{name} has shape {list(shape)} in the checkpoint, but config.json makes it {list(source.shape)}: take the "
        "config.json that belongs to this checkpoint."
    )


def unknown_tensor(name: str, spec: Qwen3NextSpec) -> WeightError:
    """The error for a checkpoint tensor that this model has no place for."""
    if spec.quant is not None and (spec.quant.method != "fp8" or spec.quant.weight_block_size is None):
        kind = spec.quant.method if spec.quant.method != "fp8" else "fp8 without weight_block_size"
        return WeightError(
            f"{name} belongs to {kind} quantisation, which cannot be loaded: use a bf16 checkpoint or an FP8 one "
            "with 128x128 blocks."
        )
    return WeightError(
        f"{name} is no tensor of this model: check num_hidden_layers, layer_types, mlp_only_layers and num_experts in "
        "config.json against the checkpoint."
    )
