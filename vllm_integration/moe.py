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
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from qwen3next_plugin import layers_moe
from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_fp8 import fp8_layers
from qwen3next_plugin.layers_integer import integer_layers

fp8_block_size = partial(
    layers_moe.fp8_block_size, fp8_config=Fp8Config, is_layer_skipped=is_layer_skipped, engine="vLLM"
)


def parallel_layers(spec: Qwen3NextSpec, vllm_config: VllmConfig) -> ParallelLayers:
    """What the model is built from in this process."""
    layers = ParallelLayers(
        rank=get_tensor_model_parallel_rank(),
        size=get_tensor_model_parallel_world_size(),
        expert_parallel=vllm_config.parallel_config.enable_expert_parallel,
        quant_config=vllm_config.quant_config,
        fp8_block=partial(fp8_block_size, vllm_config.quant_config),
        merged_column=MergedColumnParallelLinear,
        qkv=QKVParallelLinear,
        row=RowParallelLinear,
        replicated=ReplicatedLinear,
        silu_and_mul=SiluAndMul,
        all_reduce=tensor_model_parallel_all_reduce,
    )
    return integer_layers(fp8_layers(layers, spec), spec)
