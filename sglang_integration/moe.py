"""SGLang's layers for the parts of the model that are cut over ranks, and how it stores the experts."""

from __future__ import annotations

from functools import partial

from sglang.srt.distributed import tensor_model_parallel_all_reduce
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.quantization.fp8 import Fp8Config
from sglang.srt.layers.quantization.utils import is_layer_skipped

from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_moe import fp8_expert_block

from .names import get_parallel


def expert_block_size(quant_config: QuantizationConfig | None, prefix: str) -> int | None:
    """128 for FP8 experts with 128x128 scales, None for unquantised ones; PluginError for any other format."""
    if quant_config is None:
        return None
    block = None
    if isinstance(quant_config, Fp8Config):
        if is_layer_skipped(prefix, quant_config.ignored_layers, quant_config.packed_modules_mapping):
            return None
        block = quant_config.weight_block_size
    return fp8_expert_block(quant_config.get_name(), block, prefix, "SGLang")


def parallel_layers(quant_config: QuantizationConfig | None) -> ParallelLayers:
    """What the model is built from in this process."""
    parallel = get_parallel()
    return ParallelLayers(
        rank=parallel.tp_rank,
        size=parallel.tp_size,
        expert_parallel=parallel.ep_size > 1,
        quant_config=quant_config,
        expert_block=partial(expert_block_size, quant_config),
        merged_column=MergedColumnParallelLinear,
        qkv=QKVParallelLinear,
        row=RowParallelLinear,
        replicated=ReplicatedLinear,
        silu_and_mul=SiluAndMul,
        all_reduce=tensor_model_parallel_all_reduce,
    )
