"""YaRN through SGLang: overrides meet the checkpoint's rope here, before SGLang derives how long a request may be.

SGLang writes --json-model-override-args over the config (0.5.20 puts a rope dict in the place of the checkpoint's,
0.5.23 merges the two), takes the base from another field, and does not multiply the context by the factor. What has
to stand there instead is decided in core.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.environ import envs

from qwen3next_plugin.config_fields import broken
from qwen3next_plugin.rope_request import ROPE_DICTS, check_context, check_rope_dicts, complete_rope
from qwen3next_plugin.settings import read_settings

from .config import WRITTEN_ROPE

_BESIDE = ("rope_theta", "partial_rotary_factor")


def complete_model_rope(model_config: ModelConfig, context_length: int | None) -> None:
    """Put the whole rope and its context length in the model's (or drafter's) config; safe to repeat.

    ``context_length`` is --context-length. Raises ConfigError, the right dict in it, for a request that cannot be.
    """
    hf_config, overrides = model_config.hf_config, model_config.model_override_args
    written = getattr(hf_config, WRITTEN_ROPE, None)
    if written is None:
        raise broken("rope_parameters", "were read by another parser than SGLang's own", "use --model-config-parser hf")
    check_rope_dicts(overrides)
    _check_fields_beside(written, overrides)
    length = overrides.get("max_position_embeddings")
    rope = complete_rope(
        written,
        asked=_asked(overrides),
        shortcut=read_settings().rope,
        asked_length=length if length != written["max_position_embeddings"] else None,
    )
    if context_length is not None and not envs.SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN.get():
        check_context(rope, context_length, "--context-length")
    hf_config.rope_parameters = rope.parameters
    hf_config.rope_scaling = rope.parameters
    hf_config.max_position_embeddings = rope.context_length
    for name in _BESIDE:
        setattr(hf_config, name, rope.parameters[name])


def _asked(overrides: Mapping[str, Any]) -> Mapping[str, Any] | None:
    return next((overrides[name] for name in ROPE_DICTS if overrides.get(name)), None)


def check_processes_without_plugins(model_config: ModelConfig) -> None:
    """Raise ConfigError if SGLang's tokenizer workers, which load no plugins, would derive another context length."""
    hf_config, overrides = model_config.hf_config, model_config.model_override_args
    whole = {"rope_parameters": hf_config.rope_parameters, "max_position_embeddings": hf_config.max_position_embeddings}
    length = overrides.get("max_position_embeddings", getattr(hf_config, WRITTEN_ROPE)["max_position_embeddings"])
    asked = _asked(overrides) or {}
    # SGLang multiplies the length by the factor of a dict that does not name the original one.
    named = "factor" not in asked or "original_max_position_embeddings" in asked
    if length != hf_config.max_position_embeddings or not named:
        remedy = f"use --tokenizer-worker-num 1 or --json-model-override-args '{json.dumps(whole)}'"
        raise broken("max_position_embeddings", "is not what tokenizer workers would take", remedy)


def _check_fields_beside(written: Mapping[str, Any], overrides: Mapping[str, Any]) -> None:
    """A base or partial factor overridden at the top level has to be the checkpoint's too."""
    beside = {name: overrides[name] for name in _BESIDE if overrides.get(name) is not None}
    if beside:
        complete_rope(written, asked={"rope_type": "default", **beside})
