"""config.json as SGLang reads it: checked as it was written, and complete where SGLang's own class is not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from sglang.srt.configs.mamba_utils import Mamba2CacheParams
from sglang.srt.configs.qwen3_next import HybridLayerType, Qwen3NextConfig
from sglang.srt.utils.hf_transformers.config import HfModelConfigParser
from transformers import PretrainedConfig

from qwen3next_plugin.config import LayerKind, parse_config
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.rope_request import written_rope

from .refusal import refuse

MODEL_TYPE = "qwen3_next"
ARCHITECTURE = "Qwen3NextForCausalLM"
# Where what config.json said of the rope is kept, since SGLang writes overrides over it.
WRITTEN_ROPE = "qwen3next_written_rope"


@dataclass(kw_only=True, frozen=True)
class Qwen3NextCacheParams(Mamba2CacheParams):
    """SGLang's sizes of a request's states, told apart from other models' where a pool is made of them."""


class LayerTypesConfig(Qwen3NextConfig):
    """SGLang's config, which its caches ask for by isinstance, with ``layer_types`` as transformers 5 writes it.

    SGLang's class drops the list and derives every layer from ``full_attention_interval``, absent or not.
    """

    def __init__(self, *args: Any, layer_types: Sequence[str] | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if layer_types is None:
            return
        self.layer_types = list(layer_types)
        interval = full_attention_interval(layer_types)
        if interval is not None and getattr(self, "full_attention_interval", None) is None:
            self.full_attention_interval = interval

    @property
    def layers_block_type(self) -> list[str]:
        """Each layer's kind in SGLang's words."""
        names = getattr(self, "layer_types", None)
        if names is None:
            return list(super().layers_block_type)
        words = {
            LayerKind.FULL.value: HybridLayerType.full_attention.value,
            LayerKind.LINEAR.value: HybridLayerType.linear_attention.value,
        }
        return [words[name] for name in names]

    @property
    def mamba2_cache_params(self) -> Qwen3NextCacheParams:
        """Of this rank, as SGLang has them."""
        params = super().mamba2_cache_params
        return Qwen3NextCacheParams(**{field.name: getattr(params, field.name) for field in fields(params)})


def full_attention_interval(layer_types: Sequence[str]) -> int | None:
    """The n for which exactly every n-th layer is full attention; None for another pattern."""
    kinds = [LayerKind(name) for name in layer_types]
    if LayerKind.FULL not in kinds:
        return None
    interval = kinds.index(LayerKind.FULL) + 1
    regular = all((kind is LayerKind.FULL) == ((i + 1) % interval == 0) for i, kind in enumerate(kinds))
    return interval if regular else None


class CheckedConfigParser(HfModelConfigParser):
    """Reads config.json as SGLang does, after looking at Qwen3-Next's fields as written.

    SGLang's config class fills a missing field with the 80B model's value, so it has to be seen before that.
    """

    def parse(
        self, model: str | Path, trust_remote_code: bool, revision: str | None = None, **kwargs: Any
    ) -> PretrainedConfig:
        raw, _ = PretrainedConfig.get_config_dict(model, revision=revision, **kwargs)
        if raw.get("model_type") != MODEL_TYPE and ARCHITECTURE not in (raw.get("architectures") or ()):
            return super().parse(model, trust_remote_code, revision, **kwargs)
        try:
            parse_config(raw)
        except PluginError as error:
            refuse(error)
        config = super().parse(model, trust_remote_code, revision, **kwargs)
        setattr(config, WRITTEN_ROPE, written_rope(raw))
        return config
