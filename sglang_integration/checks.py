"""What is checked, inside SGLang's own steps, before it loads anything; each is an AROUND hook of its function.

They raise PluginError; `registration` makes a refusal of it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.server_args import ServerArgs
from torch import nn

from qwen3next_plugin.config import Qwen3NextSpec, parse_config
from qwen3next_plugin.errors import RegistrationError
from qwen3next_plugin.quantization import NAME, check_asked, is_ours
from qwen3next_plugin.weights import check_checkpoint
from qwen3next_plugin.weights_shards import check_tensor_parallel

from .config import MODEL_TYPE
from .limits import check_supported
from .rope import check_processes_without_plugins, complete_model_rope

_check_files = lru_cache(maxsize=4)(check_checkpoint)


def is_qwen3_next(model_config: ModelConfig) -> bool:
    """Whether a config of SGLang's describes the model that this package serves, or its drafter."""
    return model_config.hf_config.model_type == MODEL_TYPE


def derive_context_length(original: Callable[..., None], model_config: ModelConfig, context_length: int | None) -> None:
    """Around ModelConfig._derive_context_length, the first to see a config with every override in it."""
    if is_qwen3_next(model_config):
        complete_model_rope(model_config, context_length)
    original(model_config, context_length)


def verify_quantization(original: Callable[..., None], model_config: ModelConfig) -> None:
    """Around ModelConfig._verify_quantization: packed integers of this model are a method of our own."""
    if is_ours(model_config.hf_config.to_dict(), model_config.quantization):
        model_config.quantization = NAME
    else:
        original(model_config)


def model_config_from(
    original: Callable[..., ModelConfig], server_args: ServerArgs, *args: Any, **kwargs: Any
) -> ModelConfig:
    """Around ModelConfig.from_server_args: the config, with its overrides, meets ranks and files."""
    model_config = original(server_args, *args, **kwargs)
    if is_qwen3_next(model_config):
        if server_args.model_impl not in ("auto", "sglang"):
            raise _not_ours(f"its --model-impl {server_args.model_impl}")
        spec = parse_config(model_config.hf_config)
        check_asked(spec, model_config.quantization)
        _check(spec, Path(model_config.model_path), server_args)
        if server_args.tokenizer_worker_num > 1:
            check_processes_without_plugins(model_config)
    return model_config


def _check(spec: Qwen3NextSpec, directory: Path, server_args: ServerArgs) -> None:
    check_supported(spec, server_args)
    check_tensor_parallel(spec, server_args.tp_size)
    if directory.is_dir() and server_args.load_format in ("auto", "safetensors"):
        _check_files(directory, spec)


def model_architecture(
    original: Callable[..., tuple[type[nn.Module], str]], model_config: ModelConfig
) -> tuple[type[nn.Module], str]:
    """Around get_model_architecture: what SGLang is about to build for Qwen3-Next has to be a class of this package."""
    model, name = original(model_config)
    if is_qwen3_next(model_config) and not model.__module__.startswith(f"{__package__}."):
        raise _not_ours(f"{model.__module__}.{model.__qualname__}")
    return model, name


def _not_ours(found: str) -> RegistrationError:
    remedy = "drop what replaces it, or set QWEN3NEXT_PLUGIN=0 to run the stock engine"
    return RegistrationError(f"SGLang would serve {found} in place of qwen3next-plugin's model: {remedy}.")
