"""Weights made on the GPU, for SGLang's own model and ours alike: SGLang's loader with another source of tensors."""

from __future__ import annotations

import copy
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from sglang.srt.configs.load_config import LoadFormat
from sglang.srt.model_loader.loader import DefaultModelLoader
from torch import nn

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.synthetic import synthetic_tensors

logger = logging.getLogger(f"sglang.{__name__}")


class SyntheticModelLoader(DefaultModelLoader):
    """Hands a model's own `load_weights` a checkpoint that exists nowhere else.

    Meant by ``--load-format dummy --model-loader-extra-config '{"weights": "qwen3next-synthetic", "seed": 1}'``.
    """

    def __init__(self, load_config: Any) -> None:
        self.seed = int(load_config.model_loader_extra_config.get("seed", 0))
        mine = copy.copy(load_config)
        mine.model_loader_extra_config, mine.load_format = {}, LoadFormat.AUTO
        super().__init__(mine)

    def download_model(self, model_config: Any) -> None:
        """There is nothing to download."""

    def _get_all_weights(self, model_config: Any, model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
        path = Path(model_config.model_path)
        if not (path / "config.json").is_file():
            raise WeightError(
                f"synthetic weights are made for a config.json, and {path} holds none: write one with `qwen3next bench "
                "model DIR --shape 80b` and serve DIR."
            )
        spec, device = load_spec(path), next(model.parameters()).device
        start = time.perf_counter()
        drafter = "MTP" in type(model).__name__
        yield from synthetic_tensors(spec, device, seed=self.seed, scope="mtp" if drafter else "model")
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        logger.info("Synthetic weights (seed %d) made and loaded in %.1f s", self.seed, time.perf_counter() - start)
