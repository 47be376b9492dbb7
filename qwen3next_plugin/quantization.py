"""Which models run on this package's layers for packed integers: one decision for both engines."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

import torch

from .config import MODEL_TYPES, Qwen3NextSpec, parse_config
from .errors import ConfigError

NAME = "qwen3next"
"""The quantisation method that engines are told in place of the checkpoint's."""

MIN_CAPABILITY = 80  # bf16 on tensor cores

# What engines call a checkpoint's method once they have chosen kernels for it, or may be asked to.
_SAME = {
    "awq": ("awq", "awq_marlin", "auto_awq", "moe_wna16"),
    "gptq": ("gptq", "gptq_marlin", "auto_gptq", "moe_wna16"),
    "compressed-tensors": ("compressed-tensors", "compressed_tensors", "w8a8_int8"),
}


class ConcernsNoLayer:
    """What both engines ask of a quantisation, for one that leaves all of their layers unquantised."""

    def get_name(self) -> str:
        return NAME

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Self:
        return cls()


def is_ours(config: Mapping[str, Any], asked: str | None) -> bool:
    """Whether ``config`` (config.json's content) is Qwen3-Next in packed integers, and ``asked`` no other method.

    Raises ConfigError for a config that cannot be parsed.
    """
    if config.get("model_type") not in MODEL_TYPES or not config.get("quantization_config"):
        return False
    quant = parse_config(config).quant
    return quant is not None and bool(quant.rules) and asked in (None, NAME, *_SAME[quant.method])


def check_asked(spec: Qwen3NextSpec, found: str | None) -> None:
    """Raise ConfigError where an engine is about to run packed integers by another method, ``found``, than ours."""
    if spec.quant is not None and spec.quant.rules and found != NAME:
        raise ConfigError(
            f"--quantization is {found}: the checkpoint is {spec.quant.method}, which this package runs on its own "
            "kernels, drop it, or set QWEN3NEXT_PLUGIN=0 to run the stock engine.",
            "quantization",
        )
