"""The Gated DeltaNet layer inside vLLM: vLLM's parallel layers for the projections, our kernels between them."""

from typing import cast

import torch
from vllm.compilation.breakable_cudagraph import eager_break_during_capture
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.mamba.abstract import MambaBase
from vllm.model_executor.layers.mamba.mamba_utils import (
    MambaStateDtypeCalculator,
    MambaStateShapeCalculator,
    is_conv_state_dim_first,
)
from vllm.utils.torch_utils import LayerNameType, _encode_layer_name, _resolve_layer_name, direct_register_custom_op
from vllm.v1.attention.backend import AttentionBackend
from vllm.v1.attention.backends.registry import MambaAttentionBackendEnum

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.kernels.gdn.step import gdn_step
from qwen3next_plugin.layers import GdnParts
from qwen3next_plugin.layers_base import ParallelLayers, ZeroCentredRMSNorm

from .gdn_metadata import Qwen3NextGdnBackend, Qwen3NextGdnMetadata
from .names import GDN_CORE_OP


def gdn_state_shape(spec: Qwen3NextSpec, vllm_config: VllmConfig) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Shapes of one state block on one rank: the convolution's window (one longer a draft token), the fast weights."""
    gdn = spec.gdn
    speculative = vllm_config.speculative_config
    return MambaStateShapeCalculator.gated_delta_net_state_shape(
        vllm_config.parallel_config.tensor_parallel_size,
        gdn.num_k_heads,
        gdn.num_v_heads,
        gdn.head_k_dim,
        gdn.head_v_dim,
        gdn.conv_kernel_size,
        (speculative.num_speculative_tokens or 0) if speculative else 0,
    )


def gdn_state_dtype(vllm_config: VllmConfig) -> tuple[torch.dtype, torch.dtype]:
    """Dtypes of the two states, from --mamba-cache-dtype and --mamba-ssm-cache-dtype."""
    cache = vllm_config.cache_config
    return MambaStateDtypeCalculator.gated_delta_net_state_dtype(
        vllm_config.model_config.dtype, cache.mamba_cache_dtype, cache.mamba_ssm_cache_dtype
    )


class Qwen3NextGdnLayer(GdnParts, MambaBase):
    """Gated DeltaNet over vLLM's state blocks."""

    def __init__(self, spec: Qwen3NextSpec, vllm_config: VllmConfig, layers: ParallelLayers, prefix: str) -> None:
        super().__init__(spec, layers, prefix)
        self.spec = spec
        self.vllm_config = vllm_config
        registered = get_current_vllm_config().compilation_config.static_forward_context
        if prefix in registered:
            raise ValueError(f"two layers are named {prefix!r}")
        registered[prefix] = self

    # What vLLM's cache manager asks of a layer with recurrent state.
    @property
    def mamba_type(self) -> MambaAttentionBackendEnum:
        return MambaAttentionBackendEnum.GDN_ATTN

    def get_state_shape(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return gdn_state_shape(self.spec, self.vllm_config)

    def get_state_dtype(self) -> tuple[torch.dtype, torch.dtype]:
        return gdn_state_dtype(self.vllm_config)

    def get_attn_backend(self) -> type[AttentionBackend]:
        return Qwen3NextGdnBackend

    def forward(
        self, hidden_states: torch.Tensor, residual: torch.Tensor | None, norm: ZeroCentredRMSNorm
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both [T, hidden_size] -> the output for the sum's norm, summed over the ranks; the sum."""
        qkvz, ba, residual = self.project(hidden_states, residual, norm)
        core = qkvz.new_empty(qkvz.shape[0], self.num_v_heads, self.head_v_dim)
        torch.ops.vllm.qwen3next_plugin_gdn_core(qkvz, ba, core, _encode_layer_name(self.prefix))
        return self.finish(core), residual

    def states(self) -> tuple[torch.Tensor, torch.Tensor]:
        """conv_state [S, conv_dim, L] and ssm_state [S, HV, V, K] as the kernels take them, once vLLM has a cache."""
        # The base class leaves one tensor a state here.
        conv_state, ssm_state = cast(tuple[torch.Tensor, torch.Tensor], self.kv_cache)
        return conv_state if is_conv_state_dim_first() else conv_state.transpose(1, 2), ssm_state

    def run_core(self, qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor) -> None:
        """Convolution, delta rule and gated norm of this step's rows; qkvz and ba are this rank's flat projections."""
        step_metadata = get_forward_context().attn_metadata
        metadata = step_metadata.get(self.prefix) if isinstance(step_metadata, dict) else None
        if metadata is None:  # vLLM's memory profiling runs without a cache
            out.zero_()
            return
        assert isinstance(metadata, Qwen3NextGdnMetadata)
        gdn_step(
            qkvz,
            *self.gates(ba),
            self.core_parameters(),
            *self.states(),
            out,
            prefill=metadata.prefill,
            recurrent=metadata.recurrent,
        )


@eager_break_during_capture
def qwen3next_plugin_gdn_core(
    qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: LayerNameType
) -> None:
    """The custom op behind `Qwen3NextGdnLayer.run_core`: opaque to torch.compile, fills `out` and the states."""
    layer = get_forward_context().no_compile_layers[_resolve_layer_name(layer_name)]
    layer.run_core(qkvz, ba, out)


def _gdn_core_fake(qkvz: torch.Tensor, ba: torch.Tensor, out: torch.Tensor, layer_name: LayerNameType) -> None:
    return None


direct_register_custom_op(
    op_name=GDN_CORE_OP.split("::")[1],
    op_func=qwen3next_plugin_gdn_core,
    mutates_args=["out"],
    fake_impl=_gdn_core_fake,
)
