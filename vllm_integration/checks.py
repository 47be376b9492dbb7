"""What is checked before vLLM starts anything: config.json as it was written, and the headers of a local checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig
from vllm.config import VllmConfig
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.transformers_utils.config import HFConfigParser

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.quantization import check_asked
from qwen3next_plugin.settings import read_settings
from qwen3next_plugin.weights import check_checkpoint
from qwen3next_plugin.weights_shards import check_tensor_parallel

from .prefill_graphs import capture_prompts
from .refusal import refuse
from .rope import (
    check_max_model_len,
    check_rope_overrides,
    record_checkpoint_rope,
    share_rope_with_drafter,
)
from .spec import spec_of

MODEL_TYPE = "qwen3_next"


class CheckedConfigParser(HFConfigParser):
    """Reads config.json as vLLM does, after looking at Qwen3-Next's fields as written.

    transformers fills a missing field with the 80B model's value, so it has to be seen before that.
    """

    def parse(
        self, model: str | Path, trust_remote_code: bool, revision: str | None = None, *args: Any, **kwargs: Any
    ) -> tuple[dict, PreTrainedConfig]:
        raw, _ = PreTrainedConfig.get_config_dict(model, revision=revision)
        if raw.get("model_type") != MODEL_TYPE:
            return super().parse(model, trust_remote_code, revision, *args, **kwargs)
        try:
            quant = parse_config(raw).quant
            if quant is not None and quant.rules:
                from . import quantization  # noqa: F401 - vLLM asks it which method the checkpoint is
            # vLLM hands over those of its overrides that are no dicts.
            check_rope_overrides(kwargs.get("hf_overrides"))
        except PluginError as error:
            refuse(error)
        config_dict, hf_config = super().parse(model, trust_remote_code, revision, *args, **kwargs)
        record_checkpoint_rope(hf_config, raw)
        return config_dict, hf_config


class CheckedCheckpoint(VerifyAndUpdateConfig):
    """vLLM's hook for an architecture's settings: here the config with its overrides meets the files, and what else is
    to be captured is said.
    """

    @staticmethod
    def verify_and_update_config(vllm_config: VllmConfig) -> None:
        directory = Path(vllm_config.model_config.model)
        try:
            check_rope_overrides(vllm_config.model_config.hf_overrides)
            spec = spec_of(vllm_config)
            check_max_model_len(vllm_config, spec)
            share_rope_with_drafter(vllm_config)
            check_asked(spec, vllm_config.model_config.quantization)
            check_tensor_parallel(spec, vllm_config.parallel_config.tensor_parallel_size)
            if directory.is_dir() and vllm_config.load_config.load_format in ("auto", "hf", "safetensors"):
                check_checkpoint(directory, spec)
            if read_settings().prefill_graphs:
                capture_prompts(vllm_config)
        except PluginError as error:
            refuse(error)
