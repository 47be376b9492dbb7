"""`--load-format qwen3next-synthetic`: weights made on the GPU, for vLLM's own model and ours alike."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from torch import nn
from vllm.config import ModelConfig
from vllm.logger import init_logger
from vllm.model_executor.model_loader import register_model_loader
from vllm.model_executor.model_loader.base_loader import BaseModelLoader

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.synthetic_names import LOAD_FORMAT

logger = init_logger(f"vllm.{__name__}")


@register_model_loader(LOAD_FORMAT)
class SyntheticModelLoader(BaseModelLoader):
    """Hands a model's own `load_weights` a checkpoint that exists nowhere else.

    ``--model-loader-extra-config '{"seed": 1}'`` gives other weights.
    """

    def download_model(self, model_config: ModelConfig) -> None:
        """There is nothing to download."""

    def load_weights(self, model: nn.Module, model_config: ModelConfig) -> None:
        """Raises WeightError where the model says that some of its parameters were not loaded."""
        # Here, because this module is imported wherever vLLM's loaders are.
        from qwen3next_plugin.synthetic import synthetic_tensors

        if not (Path(model_config.model) / "config.json").is_file():
            raise WeightError(
                f"--load-format {LOAD_FORMAT} makes weights for a config.json, and {model_config.model} holds none: "
                "write one with `qwen3next bench model DIR --shape 80b` and serve DIR."
            )
        extra = self.load_config.model_loader_extra_config or {}
        drafter = "MTP" in type(model).__name__
        device = next(model.parameters()).device
        load: Any = model.load_weights
        start = time.perf_counter()
        spec = load_spec(model_config.model)
        seed = int(extra.get("seed", 0))
        loaded = load(synthetic_tensors(spec, device, seed=seed, scope="mtp" if drafter else "model"))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        missing = {name for name, _ in model.named_parameters()} - (loaded or set()) if loaded is not None else set()
        if missing and model_config.quantization is None:  # quantised layers add parameters that no checkpoint has
            raise WeightError(f"{min(missing)} was left without weights by {type(model).__name__}.load_weights.")
        logger.info("Synthetic weights (seed %d) made and loaded in %.1f s", seed, time.perf_counter() - start)
