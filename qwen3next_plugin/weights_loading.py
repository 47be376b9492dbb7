"""Checkpoint tensors into an engine's parameters; names, layouts and completeness are decided here for both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from .errors import WeightError
from .spec import Qwen3NextSpec
from .weights import Placement, fused_stream
from .weights_map import Scope

# Both engines number the parts of their merged columns and name those of their attention projection.
_SHARD_IDS: dict[str, int | str] = {"q": "q", "k": "k", "v": "v", "gate": 0, "up": 1}


def load_parameters(
    parameters: Mapping[str, nn.Parameter],
    weights: Iterable[tuple[str, torch.Tensor]],
    spec: Qwen3NextSpec,
    scope: Scope,
    *,
    default_loader: Callable[[nn.Parameter, torch.Tensor], None],
    elsewhere: Callable[[str], bool] = lambda name: False,
) -> set[str]:
    """Loads the checkpoint's decoder ("model"), or its MTP layer with the embedding and head that it shares ("mtp").

    A parameter is filled by its own ``weight_loader`` or by ``default_loader``; those that ``elsewhere`` says are on
    another rank are passed over. Returns the names of the parameters loaded. Raises WeightError for a tensor that is
    missing, unknown or misshapen.
    """
    loaded = set()
    for fused, tensor, placement in fused_stream(weights, spec, scope=scope):
        # The drafter keeps its modules, `mtp.*` in the checkpoint, under `model`.
        name = "model." + fused.removeprefix("mtp.") if scope == "mtp" and fused.startswith("mtp.") else fused
        if elsewhere(name):
            continue
        parameter = parameters.get(name)
        if parameter is None:
            raise WeightError(
                f"{fused} is in the checkpoint, but the layer it belongs to holds no such parameter with this "
                "quantization_config: list the module in modules_to_not_convert, or take this checkpoint's config.json."
            )
        _place(parameter, tensor, placement, default_loader)
        loaded.add(name)
    return loaded


def _place(
    parameter: nn.Parameter,
    tensor: torch.Tensor,
    placement: Placement,
    default_loader: Callable[[nn.Parameter, torch.Tensor], None],
) -> None:
    loader: Callable[..., None] = getattr(parameter, "weight_loader", default_loader)
    if ".experts." in placement.name or getattr(parameter, "takes_placement", False):
        loader(parameter, tensor, placement)
    elif placement.shard is not None:
        loader(parameter, tensor, _SHARD_IDS[placement.shard])
    else:
        loader(parameter, tensor)
