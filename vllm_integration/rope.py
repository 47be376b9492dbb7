"""YaRN through vLLM: overrides meet the checkpoint's rope here, before vLLM derives how long a request may be.

vLLM puts a dict given by --hf-overrides in the place of the checkpoint's `rope_parameters`, fills nothing in and no
longer multiplies the context by the factor. What has to stand there instead is decided in core.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Mapping
from typing import Any

import vllm.envs as envs
from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.config.model_arch import ModelArchitectureConfig
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from qwen3next_plugin.config_fields import broken
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.rope_request import CompleteRope, check_context, check_rope_dicts, complete_rope, written_rope
from qwen3next_plugin.settings import read_settings
from qwen3next_plugin.spec import Qwen3NextSpec

from .refusal import refuse

_RECORD = "qwen3next_checkpoint_rope"


def record_checkpoint_rope(hf_config: PreTrainedConfig, raw: Mapping[str, Any]) -> None:
    """Keep beside the config what config.json said of the rope, since overrides replace it in place."""
    record = {"written": written_rope(raw), "loaded": copy.deepcopy(hf_config.rope_parameters)}
    setattr(hf_config, _RECORD, record)


def check_rope_overrides(overrides: object) -> None:
    """Raise ConfigError for overrides of the rope that are no dict or differ; overrides may also be a function."""
    if isinstance(overrides, Mapping):
        check_rope_dicts(overrides)


class RopeCompletingConvertor(ModelArchConfigConvertorBase):
    """The first to see a config with every override in it; vLLM reads the context length from what this returns."""

    def convert(self, *args: Any, **kwargs: Any) -> ModelArchitectureConfig:
        try:
            _complete(self.hf_config)
        except PluginError as error:
            refuse(error)
        return super().convert(*args, **kwargs)

    def derive_max_model_len_and_key(self) -> tuple[float, str | None]:
        return self.hf_config.max_position_embeddings, "max_position_embeddings"


def _complete(hf_config: PreTrainedConfig) -> None:
    """Put the whole rope and its context length in the config; changes nothing the second time."""
    record = getattr(hf_config, _RECORD, None)
    if record is None:
        raise broken("rope_parameters", "were read by another parser than vLLM's own", "use --config-format hf")
    found, length = hf_config.rope_parameters, hf_config.max_position_embeddings
    rope = complete_rope(
        record["written"],
        asked=found if found != record["loaded"] else None,
        shortcut=read_settings().rope,
        asked_length=length if length != record["written"]["max_position_embeddings"] else None,
    )
    hf_config.rope_parameters = rope.parameters
    hf_config.max_position_embeddings = rope.context_length
    if not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        # vLLM asks this field whether a longer --max-model-len is all right, and would point to the variable above if
        # it is not; check_max_model_len, a moment later, says what extends the context instead.
        hf_config.model_max_length = sys.maxsize


def check_max_model_len(vllm_config: VllmConfig, spec: Qwen3NextSpec) -> None:
    """Raise ConfigError if --max-model-len is more than the rope covers, unless vLLM was told to let it pass."""
    if not envs.VLLM_ALLOW_LONG_MAX_MODEL_LEN:
        rope = CompleteRope(spec.rope, spec.max_position_embeddings)
        check_context(rope, vllm_config.model_config.max_model_len, "--max-model-len")


def share_rope_with_drafter(vllm_config: VllmConfig) -> None:
    """Give the drafter the model's own rope and context: vLLM keeps --hf-overrides that are dicts from it."""
    speculative = vllm_config.speculative_config
    draft = speculative.draft_model_config if speculative is not None else None
    if draft is None or draft.hf_config.model_type != "qwen3_next_mtp":
        return
    target = vllm_config.model_config
    draft.hf_config.rope_parameters = copy.deepcopy(target.hf_config.rope_parameters)
    draft.hf_config.max_position_embeddings = target.hf_config.max_position_embeddings
    if speculative.max_model_len is None:
        draft.max_model_len = target.max_model_len
