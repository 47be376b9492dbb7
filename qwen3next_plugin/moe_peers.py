"""What both engines' adapters do to have an engine's grouped product tried for the experts."""

from __future__ import annotations

import torch

from .config import Qwen3NextSpec
from .errors import SettingsError
from .expert_shard import ExpertShard
from .kernels.moe.peer_deepgemm import NAME
from .kernels.moe.peers import OFFERS, ExpertShape, try_offers
from .layers_base import ParallelLayers
from .layers_moe import joins_experts


def expert_shape(spec: Qwen3NextSpec, layers: ParallelLayers) -> ExpertShape | None:
    """This rank's experts as `layers_moe.Experts` holds them, the joined shared one counted; None if not in FP8."""
    sparse = [index for index in range(spec.num_layers) if index not in spec.dense_layers]
    if not sparse:
        return None
    prefix = f"model.layers.{sparse[0]}.mlp"
    if layers.integer_format(f"{prefix}.experts.w13") is not None or layers.fp8_block(f"{prefix}.experts") is None:
        return None
    shard = ExpertShard(spec, layers.rank, layers.size, layers.expert_parallel)
    joined = int(joins_experts(spec, layers, prefix))
    return ExpertShape(shard.num_experts + joined, spec.hidden_size, shard.intermediate_size)


def try_grouped_products(spec: Qwen3NextSpec, layers: ParallelLayers, dtype: torch.dtype) -> None:
    """Tries what was offered for this rank's experts, on this process's GPU; ``dtype`` is the activations'.

    Raises SettingsError if QWEN3NEXT_MOE_PREFILL names what is not there.
    """
    shape = expert_shape(spec, layers)
    try:
        if shape is None or dtype is not torch.bfloat16:
            OFFERS.say_missing(NAME, "it takes bfloat16 tokens and experts in FP8 blocks")
            OFFERS.insist()
        else:
            try_offers(shape, torch.device("cuda", torch.cuda.current_device()))
            torch.cuda.empty_cache()  # the weights of the trial
    except ValueError as error:
        raise SettingsError(f"QWEN3NEXT_MOE_PREFILL: {error}.") from None
