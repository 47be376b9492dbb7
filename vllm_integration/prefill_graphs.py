"""CUDA graphs for prompts, which vLLM captures for decoding only.

A step of some thousand prompt tokens launches 1,500 kernels from Python, which takes longer than they run (what runs
in a step is in benchmarks/README.md). Piecewise graphs, which leave out attention and the recurrent core, launch the
rest in one go. vLLM pads a step to the next captured size, so there are four sizes between a power of two and the next:
a quarter more tokens at most.
"""

from __future__ import annotations

from vllm.config import CUDAGraphMode, VllmConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform

from qwen3next_plugin.kernels.integers import padded_tokens

MOST_TOKENS = 8192
"""Larger steps keep a GPU busy for longer than their launches take."""

# vLLM shows the loggers below "vllm".
logger = init_logger("vllm.qwen3next_plugin")


def prompt_sizes(decoding: int, most: int) -> list[int]:
    """Sizes to capture for prompts, in tokens: above those of ``decoding``, up to ``most`` and `MOST_TOKENS`."""
    most = min(most, MOST_TOKENS)
    sizes: list[int] = []
    while (size := padded_tokens((sizes or [decoding])[-1] + 1)) < most:
        sizes.append(size)
    return [*sizes, most] if decoding < most else []


def capture_prompts(vllm_config: VllmConfig) -> None:
    """Adds the sizes of prompts to those vLLM chose to capture; what a user chose is left as it is.

    Called before vLLM makes its own choice final, which it does again with these sizes in place.
    """
    chosen = vllm_config.compilation_config
    asked = chosen.cudagraph_capture_sizes is not None or chosen.max_cudagraph_capture_size is not None
    modes = (None, CUDAGraphMode.PIECEWISE, CUDAGraphMode.FULL_AND_PIECEWISE)
    if asked or chosen.cudagraph_mode not in modes or current_platform.device_type != "cuda":
        return
    vllm_config._set_cudagraph_sizes()
    decoding = chosen.cudagraph_capture_sizes
    if not decoding:  # --enforce-eager
        return
    sizes = prompt_sizes(decoding[-1], vllm_config.scheduler_config.max_num_batched_tokens)
    if sizes:
        chosen.cudagraph_capture_sizes = [*decoding, *sizes]
        chosen.max_cudagraph_capture_size = sizes[-1]
        logger.info("CUDA graphs for prompts of up to %d tokens, in %d sizes", sizes[-1], len(sizes))
