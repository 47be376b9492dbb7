"""The one line that says this plugin runs, and with what; and what is better not left as it is."""

from __future__ import annotations

from functools import lru_cache

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qwen3next_plugin.activation import activation_line, state_type_advice
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.kernels.dispatch import describe

from .gdn_layer import gdn_state_dtype
from .gdn_peers import offer_engine_prefills
from .moe_peers import offer_engine_products
from .refusal import refuse

# vLLM shows the loggers below "vllm".
logger = init_logger("vllm.qwen3next_plugin")


def announce(vllm_config: VllmConfig) -> None:
    """Logs the activation line once a process, from the model itself: no model of ours, no line.

    Before it, on a GPU, tries what vLLM brings for prefills: the line says what was found.
    """
    if current_platform.device_type == "cuda":
        _offer_once(vllm_config)
    stored = str(gdn_state_dtype(vllm_config)[1]).removeprefix("torch.")
    _announce_once(current_platform.get_device_name(), current_platform.device_type, stored)


_offered = False


def _offer_once(vllm_config: VllmConfig) -> None:
    global _offered
    if _offered:
        return
    _offered = True
    try:
        offer_engine_prefills(vllm_config)
        offer_engine_products(vllm_config)
    except PluginError as error:
        refuse(error)


@lru_cache(maxsize=1)
def _announce_once(device_name: str, device_type: str, stored: str) -> None:
    logger.info(activation_line("vllm", vllm.__version__, device_name, describe(device_type)))
    advice = state_type_advice(stored, "--mamba-ssm-cache-dtype")
    if advice:
        logger.warning(advice)
