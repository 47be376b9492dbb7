"""The Gated DeltaNet layer inside SGLang: its parallel layers for the projections, its backend between them."""

from __future__ import annotations

import torch
from sglang.srt.layers.linear import MergedColumnParallelLinear, RowParallelLinear
from sglang.srt.layers.quantization.base_config import QuantizationConfig
from sglang.srt.layers.radix_linear_attention import RadixLinearAttention
from sglang.srt.model_executor.forward_batch_info import ForwardBatch

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.layers import GdnParts

from .names import tensor_parallel


class Qwen3NextGdnLayer(GdnParts):
    """Gated DeltaNet with the checkpoint's interleaved projections re-laid flat (q | k | v | z and b | a) at load."""

    def __init__(
        self, spec: Qwen3NextSpec, layer_id: int, quant_config: QuantizationConfig | None, prefix: str
    ) -> None:
        super().__init__(spec, *tensor_parallel(), prefix)
        gdn = spec.gdn
        self.in_proj_qkvz = MergedColumnParallelLinear(
            spec.hidden_size,
            [gdn.key_dim, gdn.key_dim, gdn.value_dim, gdn.value_dim],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_qkvz",
        )
        self.in_proj_ba = MergedColumnParallelLinear(
            spec.hidden_size,
            [gdn.num_v_heads, gdn.num_v_heads],
            bias=False,
            quant_config=quant_config,
            prefix=f"{prefix}.in_proj_ba",
        )
        self.out_proj = RowParallelLinear(
            gdn.value_dim, spec.hidden_size, bias=False, quant_config=quant_config, prefix=f"{prefix}.out_proj"
        )
        # What SGLang's backends take a layer's sizes and recurrent weights from; the parameters are this layer's own.
        self.attn = RadixLinearAttention(
            layer_id=layer_id,
            num_q_heads=self.num_k_heads,
            num_k_heads=self.num_k_heads,
            num_v_heads=self.num_v_heads,
            head_q_dim=gdn.head_k_dim,
            head_k_dim=gdn.head_k_dim,
            head_v_dim=gdn.head_v_dim,
            conv_weights=self.conv1d.weight,
            A_log=self.A_log,
            dt_bias=self.dt_bias,
        )

    def forward(self, hidden_states: torch.Tensor, forward_batch: ForwardBatch) -> torch.Tensor:
        """hidden_states [T, hidden_size] -> [T, hidden_size], summed over the tensor-parallel ranks."""
        qkvz, _ = self.in_proj_qkvz(hidden_states)
        ba, _ = self.in_proj_ba(hidden_states)
        mixed_qkv, z, b, a = self.split(qkvz, ba)
        core = self.attn(forward_batch, mixed_qkv=mixed_qkv, a=a, b=b)
        output, _ = self.out_proj(self.gated_norm(core.view_as(z), z))
        return output
