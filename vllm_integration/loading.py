"""Checkpoint tensors into vLLM's parameters; names, layouts and completeness are decided in the core."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.weights_loading import load_parameters
from qwen3next_plugin.weights_map import Scope


def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec, scope: Scope
) -> set[str]:
    """Loads the checkpoint's decoder ("model"), or its MTP layer with the embedding and head that it shares ("mtp")."""
    return load_parameters(
        dict(model.named_parameters()),
        weights,
        spec,
        scope,
        default_loader=default_weight_loader,
        elsewhere=lambda name: is_pp_missing_parameter(name, model),
    )
