"""Checkpoint tensors into vLLM's parameters; names, layouts and completeness are decided in the core."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.model_executor.models.utils import is_pp_missing_parameter

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.weights import Placement, fused_stream
from qwen3next_plugin.weights_map import Scope

# vLLM numbers the parts of its merged columns and names those of its attention projection.
_SHARD_IDS: dict[str, int | str] = {"q": "q", "k": "k", "v": "v", "gate": 0, "up": 1}


def load_weights(
    model: nn.Module, weights: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec, scope: Scope
) -> set[str]:
    """Loads the checkpoint's decoder ("model"), or its MTP layer with the embedding and head that it shares ("mtp").

    Returns the names of the parameters loaded. Raises WeightError for a tensor that is missing, unknown or misshapen.
    """
    parameters = dict(model.named_parameters())
    loaded = set()
    for fused, tensor, placement in fused_stream(weights, spec, scope=scope):
        # The drafter keeps its modules, `mtp.*` in the checkpoint, under `model`.
        name = "model." + fused.removeprefix("mtp.") if scope == "mtp" and fused.startswith("mtp.") else fused
        if is_pp_missing_parameter(name, model):
            continue
        parameter = parameters.get(name)
        if parameter is None:
            raise WeightError(
                f"{fused} is in the checkpoint, but the layer it belongs to holds no such parameter with this "
                "quantization_config: list the module in modules_to_not_convert, or take this checkpoint's config.json."
            )
        _place(parameter, tensor, placement)
        loaded.add(name)
    return loaded


def _place(parameter: nn.Parameter, tensor: torch.Tensor, placement: Placement) -> None:
    loader = getattr(parameter, "weight_loader", default_weight_loader)
    if ".experts." in placement.name:
        loader(parameter, tensor, placement)
    elif placement.shard is not None:
        loader(parameter, tensor, _SHARD_IDS[placement.shard])
    else:
        loader(parameter, tensor)
