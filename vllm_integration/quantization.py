"""Checkpoints in packed integers, as vLLM is told of them: a quantisation of this plugin's that concerns no layer.

vLLM chooses its layers, and refuses formats, by the method that it finds in config.json: on a CPU it knows others than
on a GPU, and none of them knows rows that are re-laid at load. With a method of our own, which is asked first, it
builds its unquantised layers; `qwen3next_plugin.layers_integer` brings the quantised ones.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase

from qwen3next_plugin.quantization import NAME, ConcernsNoLayer, is_ours


@register_quantization_config(NAME)
class PackedIntegers(ConcernsNoLayer, QuantizationConfig):
    """What vLLM asks of a quantisation, for one that concerns none of its layers."""

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """NAME for Qwen3-Next in packed integers, unless the user asks for another method than the checkpoint's."""
        ours = hf_config is not None and is_ours(hf_config.to_dict(), user_quant)
        return NAME if ours else None

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> QuantizeMethodBase | None:
        return UnquantizedLinearMethod() if isinstance(layer, LinearBase) else None
