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
from vllm.model_executor.utils import set_weight_attrs

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.kernels.moe import add_shared_expert, fused_moe, route
from qwen3next_plugin.weights import Placement

from .norm import WeightHolder

FP8_BLOCK = 128


def expert_block_size(quant_config: QuantizationConfig | None, prefix: str) -> int | None:
    """128 for FP8 experts with 128x128 scales, None for unquantised ones.

    Raises PluginError for any other format: serving it with the wrong arithmetic would be silent.
    """
    if quant_config is None:
        return None
    if isinstance(quant_config, Fp8Config):
        if is_layer_skipped(prefix, quant_config.ignored_layers, quant_config.packed_modules_mapping):
            return None
        if quant_config.weight_block_size == [FP8_BLOCK, FP8_BLOCK]:
            return FP8_BLOCK
    raise PluginError(
        f"quantization: the experts of {prefix} are stored as {quant_config.get_name()} "
        f"(weight_block_size {getattr(quant_config, 'weight_block_size', None)}), which this plugin does not run; "
        "bf16 and fp8 with weight_block_size [128, 128] work, and QWEN3NEXT_PLUGIN=0 serves it with stock vLLM."
    )


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


class Qwen3NextExperts(nn.Module):
    """This rank's routed experts: a slice of every expert under TP, a range of whole experts under EP."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        block = expert_block_size(vllm_config.quant_config, prefix)
        self.shard = ExpertShard(
            spec,
            get_tensor_model_parallel_rank(),
            get_tensor_model_parallel_world_size(),
            vllm_config.parallel_config.enable_expert_parallel,
        )
        rows, hidden = self.shard.intermediate_size, spec.hidden_size
        dtype = torch.float8_e4m3fn if block else None
        self.w13 = self._parameter(self.shard.num_experts, 2 * rows, hidden, dtype=dtype)
        self.w2 = self._parameter(self.shard.num_experts, hidden, rows, dtype=dtype)
        self.w13_scale_inv: nn.Parameter | None = None
        self.w2_scale_inv: nn.Parameter | None = None
        if block:
            columns, scale_rows = -(-hidden // block), -(-rows // block)
            self.w13_scale_inv = self._parameter(self.shard.num_experts, 2 * scale_rows, columns, dtype=torch.float32)
            self.w2_scale_inv = self._parameter(self.shard.num_experts, columns, scale_rows, dtype=torch.float32)

    def _parameter(self, *shape: int, dtype: torch.dtype | None) -> nn.Parameter:
        parameter = nn.Parameter(torch.empty(*shape, dtype=dtype), requires_grad=False)
        set_weight_attrs(parameter, {"weight_loader": self._load})
        return parameter

    def _load(self, parameter: nn.Parameter, loaded: torch.Tensor, placement: Placement) -> None:
        self.shard.place(parameter.data, loaded, placement)

    def forward(self, hidden_states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """hidden_states [T, H], weights and ids [T, top_k] -> this rank's part of the weighted sum [T, H]."""
        ids = self.shard.local_ids(ids)
        return fused_moe(hidden_states, self.w13, self.w2, weights, ids, self.w13_scale_inv, self.w2_scale_inv)


class Qwen3NextMoE(nn.Module):
    """Softmax routing over all experts, the top k renormalised, plus a shared expert behind a sigmoid gate."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, prefix: str) -> None:
        super().__init__()
        self.moe = spec.moe
        self.tp_size = get_tensor_model_parallel_world_size()
        self.gate = ReplicatedLinear(
            spec.hidden_size, spec.moe.num_experts, bias=False, quant_config=None, prefix=f"{prefix}.gate"
        )
        self.experts = Qwen3NextExperts(spec, vllm_config, prefix=f"{prefix}.experts")
        self.shared_expert = Qwen3NextMLP(
            spec,
            spec.moe.shared_intermediate_size,
            vllm_config,
            prefix=f"{prefix}.shared_expert",
            reduce_results=False,
        )
        self.shared_expert_gate = WeightHolder(1, spec.hidden_size)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        logits, _ = self.gate(hidden_states)
        weights, ids = route(logits, self.moe.top_k, self.moe.norm_topk_prob)
        routed = self.experts(hidden_states, weights, ids)
        shared = self.shared_expert(hidden_states)
        output = add_shared_expert(routed, shared, hidden_states, self.shared_expert_gate.weight)
        return tensor_model_parallel_all_reduce(output) if self.tp_size > 1 else output
