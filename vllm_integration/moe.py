"""The sparse MoE block inside vLLM: our routing and experts, vLLM's parallel layers for the shared expert."""

from __future__ import annotations

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
    tensor_model_parallel_all_reduce,
)
from vllm.model_executor.layers.activation import SiluAndMul
from vllm.model_executor.layers.linear import MergedColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.quant_utils import is_layer_skipped

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.layers import MoeParts, RoutedExperts, fp8_expert_block


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


class Qwen3NextMLP(nn.Module):
    """down(silu(gate(x)) * up(x)), the plain MLP and the shared expert."""

    def __init__(
        self, spec: Qwen3NextSpec, intermediate_size: int, vllm_config: VllmConfig, prefix: str, reduce_results: bool
    ) -> None:
        super().__init__()
        quant_config = vllm_config.quant_config
        self.gate_up_proj = MergedColumnParallelLinear(
            spec.hidden_size,
            [intermediate_size] * 2,
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.gate_up_proj",
        )
        self.down_proj = RowParallelLinear(
            intermediate_size,
            spec.hidden_size,
            bias=False,
            quant_config=quant_config,
            reduce_results=reduce_results,
            prefix=f"{prefix}.down_proj",
        )
        self.act = SiluAndMul()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden_states)
        output, _ = self.down_proj(self.act(gate_up))
        return output


class Qwen3NextMoE(MoeParts):
    """Softmax routing over all experts, the top k renormalised, plus a shared expert behind a sigmoid gate."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, prefix: str) -> None:
        rank, size = get_tensor_model_parallel_rank(), get_tensor_model_parallel_world_size()
        shard = ExpertShard(spec, rank, size, vllm_config.parallel_config.enable_expert_parallel)
        super().__init__(
            spec,
            gate=ReplicatedLinear(
                spec.hidden_size, spec.moe.num_experts, bias=False, quant_config=None, prefix=f"{prefix}.gate"
            ),
            experts=RoutedExperts(shard, expert_block_size(vllm_config.quant_config, f"{prefix}.experts")),
            shared_expert=Qwen3NextMLP(
                spec,
                spec.moe.shared_intermediate_size,
                vllm_config,
                prefix=f"{prefix}.shared_expert",
                reduce_results=False,
            ),
        )
        self.tp_size = size

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        output = self.partial_sum(hidden_states)
        return tensor_model_parallel_all_reduce(output) if self.tp_size > 1 else output
