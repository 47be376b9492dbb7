"""Where each tensor of a checkpoint goes: checkpoint names to fused names, with the shapes a config demands."""

import re
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Literal

from . import weights_packed
from .errors import WeightError
from .spec import IntegerFormat, LayerKind, Qwen3NextSpec
from .weights_packed import PackedPart, Part
from .weights_sources import Placement, Source, layer_sources, top_sources

SCALE_SUFFIX = "_scale_inv"
Scope = Literal["all", "model", "mtp"]

_LAYER = re.compile(r"(model|mtp)\.layers\.(\d+)\.(.+)")
_EXPERT = re.compile(r"mlp\.experts\.(\d+)\.(.+)")
# A full-attention layer with experts, whatever layer 0 of the decoder is.
_MTP_LAYER = (LayerKind.FULL, False)
_EXPERT_TENSORS = re.compile(r"\.w(13|2)$")
_PART_SUFFIXES = {"scale": weights_packed.SCALE_SUFFIX, "zero": weights_packed.ZERO_SUFFIX}
_EXPERT_PARTS = ("gate_proj.weight", "up_proj.weight", "down_proj.weight")


class TensorMap:
    """Every checkpoint tensor a model may have, by name, and what becomes of it."""

    def __init__(self, spec: Qwen3NextSpec) -> None:
        self.spec = spec
        self._top = top_sources(spec)
        self._decoder = [(kind, index in spec.dense_layers) for index, kind in enumerate(spec.layer_kinds)]
        self._layers = {layer: layer_sources(spec, *layer) for layer in {*self._decoder, _MTP_LAYER}}
        rules = spec.quant.rules if spec.quant is not None else ()
        self._packings = {rule.format.packing for rule in rules if rule.format is not None}
        self._formats: dict[str, IntegerFormat | None] = {}
        self._stored: dict[str, tuple[str, IntegerFormat]] = {}

    def locate(self, name: str, *, int8: bool = False) -> Source | None:
        """The source of a checkpoint tensor, block scales and packed integers included; None for an unknown name.

        ``int8``: it holds such numbers, which one packing calls by the weight's own name. Raises WeightError for a part
        of a quantised tensor that the config or the model's sizes leave no meaning for.
        """
        if name.endswith(SCALE_SUFFIX):
            weight = self.locate(name.removesuffix(SCALE_SUFFIX))
            return None if weight is None else _scale_source(name, weight, self.spec)
        packed = weights_packed.split(name, self._packings)
        if int8 and "int-quantized" in self._packings and name.endswith(".weight"):
            packed = name.removesuffix(".weight"), "weight"
        return self._float(name) if packed is None else self._packed(name, *packed)

    def _packed(self, name: str, module: str, part: Part) -> Source | None:
        """The source of part ``part`` of an integer-quantised module; ``name`` is that tensor's, for messages.

        Raises WeightError for a module that the config does not quantise, or quantises unlike the others that are fused
        with it.
        """
        weight = self._float(f"{module}.weight")
        if weight is None:
            return None
        if len(weight.shape) < 2 or weight.relayout == "conv":
            raise WeightError(
                f"{name} is in the checkpoint, but this tensor is never quantised: fetch the checkpoint again."
            )
        stored = self._format_of(module)
        if stored is None:
            raise WeightError(
                f"{name} is in the checkpoint, but config.json's quantization_config leaves {module} as it is: take "
                "the config.json that belongs to this checkpoint."
            )
        fused = weight.placement.name
        first, other = self._stored.setdefault(_EXPERT_TENSORS.sub("", fused), (module, stored))
        if other != stored:
            raise WeightError(
                f"{module} is stored as {stored} and {first} as {other}, which run as one: quantise both alike."
            )
        rows, columns = weight.shape
        if stored.groups(columns) is None:
            raise WeightError(
                f"{name}: groups of {stored.group_size} do not divide its {columns} columns: use another group_size."
            )
        found = PackedPart(part, stored, rows, columns)
        shape = (*weight.fused_shape[:-2], *found.laid_out(weight.fused_shape[-2]))
        placement = weight.placement._replace(name=fused + _PART_SUFFIXES.get(part, ""))
        return weight._replace(placement=placement, shape=found.shape, fused_shape=shape, packed=found)

    def _float(self, name: str) -> Source | None:
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

    def check_complete(
        self, names: AbstractSet[str], fp8: AbstractSet[str], int8: AbstractSet[str], scope: Scope = "all"
    ) -> None:
        """Raise WeightError for the first tensor the model needs in ``scope`` that is not among ``names``.

        ``fp8`` and ``int8`` are those of them that hold such codes. MTP weights count as needed if config.json says so,
        if ``names`` has some, or if ``scope`` is "mtp". So does a tensor that means a second weight for one module.
        """
        codes = self._codes(names, int8)
        weights = {f"{module}.weight": name for module, name in codes.items()}
        twice = next((name for weight, name in weights.items() if weight in names and name != weight), None)
        if twice is not None:
            raise WeightError(f"{twice} is in the checkpoint, and the same weight unquantised: keep one of the two.")
        wants_mtp = scope == "mtp" or self.spec.num_mtp_layers > 0 or any(name.startswith("mtp.") for name in names)
        present = names | weights.keys()
        missing = next((n for n in self._needed(present, wants_mtp) if in_scope(n, scope) and n not in present), None)
        missing = missing or next((w + SCALE_SUFFIX for w in sorted(fp8) if w + SCALE_SUFFIX not in names), None)
        if missing is None:
            for module, name in codes.items():
                stored = self._format_of(module)
                beside = weights_packed.companions(module, stored, name) if stored is not None else ()
                missing = missing or next((other for other in beside if other not in names), None)
        if missing is not None:
            raise missing_tensor(missing)
        for name in names:
            part = weights_packed.split(name, self._packings)
            if part is not None and part[0] not in codes:
                raise WeightError(
                    f"{name} is in the checkpoint beside an unquantised {part[0]}.weight: keep one of the two."
                )

    def _format_of(self, module: str) -> IntegerFormat | None:
        if module not in self._formats:
            self._formats[module] = self.spec.quant.integer_format(module) if self.spec.quant is not None else None
        return self._formats[module]

    def _codes(self, names: AbstractSet[str], int8: AbstractSet[str]) -> dict[str, str]:
        """The modules stored in integers and their tensors of codes."""
        found = {name.removesuffix(".weight"): name for name in int8}
        for name in names:
            packed = weights_packed.split(name, self._packings)
            if packed is not None and packed[1] == "weight":
                found[packed[0]] = name
        return found

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
    quantised = name.endswith("_scale") or weights_packed.split(name) is not None
    if quantised and (spec.quant is None or not spec.quant.rules):
        kind = "no quantization_config" if spec.quant is None else f"an {spec.quant.method} quantization_config"
        return WeightError(
            f"{name} is part of a quantised tensor, but config.json has {kind}, which says nothing of it: take the "
            "config.json that belongs to this checkpoint, or an FP8 checkpoint with 128x128 blocks."
        )
    return WeightError(
        f"{name} is no tensor of this model: check num_hidden_layers, layer_types, mlp_only_layers and num_experts in "
        "config.json against the checkpoint."
    )
