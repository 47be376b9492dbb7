"""config.json, as transformers 4.57 and 5.x write it, to one checked and frozen `Qwen3NextSpec`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .config_fields import Fields, broken, show
from .config_quant import parse_quant
from .config_rope import parse_rope
from .errors import ConfigError
from .spec import AttentionSpec, GdnSpec, IntegerFormat, LayerKind, MoeSpec, QuantSpec, Qwen3NextSpec, RopeSpec

__all__ = [
    "AttentionSpec",
    "GdnSpec",
    "IntegerFormat",
    "LayerKind",
    "MoeSpec",
    "QuantSpec",
    "Qwen3NextSpec",
    "RopeSpec",
    "load_spec",
    "parse_config",
]

# vLLM and SGLang rename the model for their drafters and hand the same config on.
MODEL_TYPES = ("qwen3_next", "qwen3_next_mtp")
ARCHITECTURES = ("Qwen3NextForCausalLM", "Qwen3NextMTP", "Qwen3NextForCausalLMMTP")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def load_spec(path: str | Path) -> Qwen3NextSpec:
    """The spec of a checkpoint directory, or of a config.json given itself.

    Raises ConfigError if the file is missing or not JSON, or for the first broken field.
    """
    file = Path(path)
    if file.is_dir() or file.suffix != ".json":
        file = file / "config.json"
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(
            f"{file}: cannot be read ({error.strerror}): give a checkpoint directory that holds config.json."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file}: is not valid JSON ({error}): fetch the file again.") from None
    return parse_config(content)


def parse_config(config: Mapping[str, Any]) -> Qwen3NextSpec:
    """Check every field that shapes the model and return the spec.

    ``config`` is the content of config.json, or an object with ``to_dict`` such as transformers' PretrainedConfig.
    Fields that say the same thing twice must agree. Raises ConfigError, one sentence, for the first broken field.
    """
    values = config.to_dict() if hasattr(config, "to_dict") else config
    if not isinstance(values, Mapping):
        raise ConfigError(f"config.json: holds a {type(values).__name__}: it must hold a JSON object of fields.")
    fields = Fields(values)
    _check_identity(fields)
    layer_kinds = _parse_layer_kinds(fields)
    dense_layers = _parse_dense_layers(fields, len(layer_kinds))
    max_position_embeddings = fields.integer("max_position_embeddings")
    rope = parse_rope(fields, max_position_embeddings)
    return Qwen3NextSpec(
        vocab_size=fields.integer("vocab_size"),
        hidden_size=fields.integer("hidden_size"),
        intermediate_size=_parse_intermediate_size(fields, dense_layers),
        layer_kinds=layer_kinds,
        dense_layers=dense_layers,
        gdn=_parse_gdn(fields),
        attention=_parse_attention(fields, rope),
        moe=_parse_moe(fields),
        rope=rope,
        rms_norm_eps=fields.number("rms_norm_eps", 1e-6, at_most=0.1),
        tie_word_embeddings=fields.flag("tie_word_embeddings", False),
        max_position_embeddings=max_position_embeddings,
        num_mtp_layers=_parse_mtp_layers(fields),
        dtype=_parse_dtype(fields),
        quant=parse_quant(fields),
    )


def _check_identity(fields: Fields) -> None:
    fields.text("model_type", choices=MODEL_TYPES)
    architectures = fields.sequence("architectures", str, ())
    if architectures and not set(architectures) & set(ARCHITECTURES):
        raise broken("architectures", f"is {show(list(architectures))}", f"this package serves {ARCHITECTURES[0]} only")
    fields.text("hidden_act", "silu", choices=("silu",))
    if fields.flag("attention_bias", False):
        raise broken("attention_bias", "is true", "Qwen3-Next's projections have no bias, set it to false")


def _parse_layer_kinds(fields: Fields) -> tuple[LayerKind, ...]:
    """From ``layer_types`` or ``full_attention_interval`` (every n-th layer is full); both must agree if given."""
    num_layers = fields.integer("num_hidden_layers")
    derived = None
    if fields.has("full_attention_interval"):
        interval = fields.integer("full_attention_interval")
        derived = tuple(LayerKind.LINEAR if (i + 1) % interval else LayerKind.FULL for i in range(num_layers))
    if not fields.has("layer_types"):
        if derived is None:
            raise broken("layer_types", "is missing", "list every layer, or give full_attention_interval")
        return derived
    names = fields.sequence("layer_types", str)
    if len(names) != num_layers:
        remedy = f"give one entry for each of the num_hidden_layers ({num_layers}) layers"
        raise broken("layer_types", f"has {len(names)} entries", remedy)
    known = {kind.value for kind in LayerKind}
    for index, name in enumerate(names):
        if name not in known:
            raise broken("layer_types", f"has {show(name)} for layer {index}", f"use one of {', '.join(sorted(known))}")
    kinds = tuple(LayerKind(name) for name in names)
    if derived is not None and derived != kinds:
        index = next(i for i, pair in enumerate(zip(kinds, derived, strict=True)) if pair[0] != pair[1])
        found = f"has {kinds[index]} for layer {index} where full_attention_interval makes it {derived[index]}"
        raise broken("layer_types", found, "make the two agree or drop one")
    return kinds


def _parse_dense_layers(fields: Fields, num_layers: int) -> frozenset[int]:
    """Layers listed in ``mlp_only_layers`` and those that ``decoder_sparse_step`` passes over."""
    step = fields.integer("decoder_sparse_step", 1)
    dense = fields.sequence("mlp_only_layers", int, ())
    for layer in dense:
        if not 0 <= layer < num_layers:
            raise broken("mlp_only_layers", f"holds {layer}", f"layers are numbered 0 to {num_layers - 1}")
    return frozenset(dense) | frozenset(i for i in range(num_layers) if (i + 1) % step)


def _parse_intermediate_size(fields: Fields, dense_layers: frozenset[int]) -> int:
    """Only dense layers read it; configs without any may leave it out."""
    return fields.integer("intermediate_size") if dense_layers else fields.integer("intermediate_size", 0, minimum=0)


def _parse_gdn(fields: Fields) -> GdnSpec:
    gdn = GdnSpec(
        num_k_heads=fields.integer("linear_num_key_heads"),
        num_v_heads=fields.integer("linear_num_value_heads"),
        head_k_dim=fields.integer("linear_key_head_dim"),
        head_v_dim=fields.integer("linear_value_head_dim"),
        # Width 1 would be no convolution at all, and leaves no history to keep.
        conv_kernel_size=fields.integer("linear_conv_kernel_dim", minimum=2),
    )
    if gdn.num_v_heads % gdn.num_k_heads:
        remedy = f"make it a multiple of linear_num_key_heads ({gdn.num_k_heads})"
        raise broken("linear_num_value_heads", f"is {gdn.num_v_heads}", remedy)
    return gdn


def _parse_attention(fields: Fields, rope: RopeSpec) -> AttentionSpec:
    num_heads, num_kv_heads = fields.integer("num_attention_heads"), fields.integer("num_key_value_heads")
    if num_heads % num_kv_heads:
        remedy = f"make it a multiple of num_key_value_heads ({num_kv_heads})"
        raise broken("num_attention_heads", f"is {num_heads}", remedy)
    head_dim = fields.integer("head_dim")
    if head_dim % 2:
        raise broken("head_dim", f"is {head_dim}", "give an even number, rotary turns pairs of columns")
    rotary_dim = int(head_dim * rope.partial_rotary_factor)
    if rotary_dim < 2 or rotary_dim % 2:
        found = f"is {rope.partial_rotary_factor:g}, which makes {rotary_dim} rotary columns of head_dim {head_dim}"
        raise broken("partial_rotary_factor", found, "choose one that makes an even number above 0")
    return AttentionSpec(num_heads, num_kv_heads, head_dim, rotary_dim)


def _parse_moe(fields: Fields) -> MoeSpec:
    moe = MoeSpec(
        num_experts=fields.integer("num_experts"),
        top_k=fields.integer("num_experts_per_tok"),
        intermediate_size=fields.integer("moe_intermediate_size"),
        shared_intermediate_size=fields.integer("shared_expert_intermediate_size"),
        norm_topk_prob=fields.flag("norm_topk_prob", True),
    )
    if moe.top_k > moe.num_experts:
        raise broken("num_experts_per_tok", f"is {moe.top_k}", f"give at most num_experts ({moe.num_experts})")
    return moe


def _parse_mtp_layers(fields: Fields) -> int:
    layers = fields.integer("num_nextn_predict_layers", 0, minimum=0)
    if layers > 1:
        raise broken("num_nextn_predict_layers", f"is {layers}", "Qwen3-Next has one MTP layer, give 0 or 1")
    return layers


def _parse_dtype(fields: Fields) -> torch.dtype:
    """``dtype`` (5.x) or ``torch_dtype`` (4.57); bfloat16, the published one, where neither says anything."""
    found: dict[str, torch.dtype] = {}
    for name in ("dtype", "torch_dtype"):
        if not fields.has(name):
            continue
        value = fields.values[name]
        text = str(value).removeprefix("torch.")
        if not isinstance(value, str | torch.dtype) or text not in _DTYPES:
            raise broken(name, f"is {show(value)}", f"use one of {', '.join(_DTYPES)}")
        found[name] = _DTYPES[text]
    if len(set(found.values())) > 1:
        raise broken("torch_dtype", f"is {found['torch_dtype']} while dtype is {found['dtype']}", "drop one of the two")
    return next(iter(found.values()), torch.bfloat16)
