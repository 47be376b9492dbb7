"""Checkpoints in packed integers, as SGLang is told of them: a quantisation of this plugin's that concerns no layer.

SGLang chooses its layers, and refuses formats, by the method that it finds in config.json: on a CPU it knows others
than on a GPU, and none of them knows rows that are re-laid at load. With a method of our own it builds its unquantised
layers; `qwen3next_plugin.layers_integer` brings the quantised ones.
"""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import LinearBase
from sglang.srt.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod

from qwen3next_plugin.quantization import NAME, ConcernsNoLayer


class PackedIntegers(ConcernsNoLayer, QuantizationConfig):
    """What SGLang asks of a quantisation, for one that concerns none of its layers."""

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None

    def get_scaled_act_names(self) -> list[str]:
        return []


def register() -> None:
    """Make the method known by its name, on every device. Safe to repeat."""
    from sglang.srt.layers import quantization

    for methods in (quantization.QUANTIZATION_METHODS, quantization.CPU_QUANTIZATION_METHODS):
        methods[NAME] = PackedIntegers
