"""vLLM's layers for the parts of the model that are cut over ranks, and how it stores the experts."""

from __future__ import annotations

from functools import partial

from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_moe import fp8_expert_block


def expert_block_size(quant_config: QuantizationConfig | None, prefix: str) -> int | None:
    """128 for FP8 experts with 128x128 scales, None for unquantised ones; PluginError for any other format."""
    if quant_config is None:
        return None
    block = None
    if isinstance(quant_config, Fp8Config):
        if is_layer_skipped(prefix, quant_config.ignored_layers, quant_config.packed_modules_mapping):
            return None
        block = quant_config.weight_block_size
    return fp8_expert_block(quant_config.get_name(), block, prefix, "vLLM")


def parallel_layers(vllm_config: VllmConfig) -> ParallelLayers:
    """What the model is built from in this process."""
    return ParallelLayers(
        rank=get_tensor_model_parallel_rank(),
        size=get_tensor_model_parallel_world_size(),
        expert_parallel=vllm_config.parallel_config.enable_expert_parallel,
        quant_config=vllm_config.quant_config,
        expert_block=partial(expert_block_size, vllm_config.quant_config),
        merged_column=MergedColumnParallelLinear,
        qkv=QKVParallelLinear,
        row=RowParallelLinear,
        replicated=ReplicatedLinear,
        silu_and_mul=SiluAndMul,
        all_reduce=tensor_model_parallel_all_reduce,
    )
