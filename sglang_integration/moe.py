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

from qwen3next_plugin import layers_moe
from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers_base import ParallelLayers
from qwen3next_plugin.layers_fp8 import fp8_layers
from qwen3next_plugin.layers_integer import integer_layers

from .names import get_parallel

fp8_block_size = partial(
    layers_moe.fp8_block_size, fp8_config=Fp8Config, is_layer_skipped=is_layer_skipped, engine="SGLang"
)


def parallel_layers(spec: Qwen3NextSpec, quant_config: QuantizationConfig | None) -> ParallelLayers:
    """What the model is built from in this process."""
    parallel = get_parallel()
    layers = ParallelLayers(
        rank=parallel.tp_rank,
        size=parallel.tp_size,
        expert_parallel=parallel.ep_size > 1,
        quant_config=quant_config,
        fp8_block=partial(fp8_block_size, quant_config),
        merged_column=MergedColumnParallelLinear,
        qkv=QKVParallelLinear,
        row=RowParallelLinear,
        replicated=ReplicatedLinear,
        silu_and_mul=SiluAndMul,
        all_reduce=tensor_model_parallel_all_reduce,
    )
    return integer_layers(fp8_layers(layers, spec), spec)
