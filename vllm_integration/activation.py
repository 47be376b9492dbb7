"""The one line that says this plugin runs, and with what."""

from __future__ import annotations

from functools import lru_cache

import vllm
from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qwen3next_plugin.activation import activation_line
from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.dispatch import describe

# vLLM shows the loggers below "vllm".
logger = init_logger("vllm.qwen3next_plugin")


def announce(spec: Qwen3NextSpec, vllm_config: VllmConfig) -> None:
    """Logs the activation line once a process, from the model itself: no model of ours, no line."""
    _announce_once(current_platform.get_device_name(), current_platform.device_type)


@lru_cache(maxsize=1)
def _announce_once(device_name: str, device_type: str) -> None:
    logger.info(activation_line("vllm", vllm.__version__, device_name, describe(device_type)))
