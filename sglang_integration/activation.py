"""The one line that says this plugin runs, and with what; or that it was told not to."""

from __future__ import annotations

import logging
import multiprocessing

import sglang
import torch
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from transformers import PretrainedConfig

from qwen3next_plugin.activation import activation_line, plugin_version
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.dispatch import describe
from qwen3next_plugin.settings import read_settings

from .gdn_peers import offer_engine_prefills
from .moe_peers import offer_engine_products
from .refusal import refuse

logger = logging.getLogger("sglang.qwen3next_plugin")


def say_stock() -> None:
    """Logs once a server that QWEN3NEXT_PLUGIN=0 leaves SGLang as it is."""
    if multiprocessing.parent_process() is None:
        logger.warning("qwen3next-plugin %s: QWEN3NEXT_PLUGIN=0, this server is stock SGLang.", plugin_version())


_announced = False


def announce(config: PretrainedConfig, quant_config: QuantizationConfig | None) -> None:
    """Logs the activation line once a process, from the model itself: no model of ours, no line.

    Before it, on a GPU, tries what SGLang brings for prefills: the line says what was found. config and quant_config:
    the model's.
    """
    global _announced
    if _announced:
        return
    _announced = True
    device = torch.get_default_device()
    try:
        read_settings().check_device(device.type)
        if device.type == "cuda":
            offer_engine_prefills(config)
            offer_engine_products(config, quant_config)
    except PluginError as error:
        refuse(error)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    logger.info(activation_line("sglang", sglang.__version__, name, describe(device.type)))
