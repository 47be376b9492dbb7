"""SGLang's model side in this process: config published, groups made, weights loaded; no server, cache or scheduler.

Attention and the recurrent core see one whole batch without a cache, so that what is tested is the model.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.device_config import DeviceConfig
from sglang.srt.configs.load_config import LoadConfig
from sglang.srt.configs.model_config import ModelConfig
from sglang.srt.distributed import parallel_state
from sglang.srt.layers import dp_attention
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.model_executor.forward_context import ForwardContext, forward_context
from sglang.srt.model_loader import get_model
from sglang.srt.models.registry import ModelRegistry
from sglang.srt.server_args import ServerArgs
from torch.nn import functional

from qwen3next_plugin.kernels.gdn.step import PrefillRows, gdn_step
from qwen3next_plugin.sglang_integration.model import Qwen3NextForCausalLM
from qwen3next_plugin.sglang_integration.mtp import Qwen3NextForCausalLMMTP


def start(path: Path, *, rank: int = 0, size: int = 1, meeting: Path, **arguments: Any) -> None:
    """Publish a server's settings and join the groups; `meeting` is a new file that all ranks name."""
    ModelRegistry.models["Qwen3NextForCausalLM"] = Qwen3NextForCausalLM
    ModelRegistry.models["Qwen3NextForCausalLMMTP"] = Qwen3NextForCausalLMMTP
    server_args = ServerArgs(
        model_path=str(path),
        disable_radix_cache=True,
        device="cpu",
        attention_backend="torch_native",
        tp_size=size,
        dtype="float32",
        **arguments,
    )
    if torch.distributed.is_initialized():  # an earlier start, whose sizes may have been others
        parallel_state.destroy_model_parallel()
        parallel_state.destroy_distributed_environment()
    publish: Any = runtime_context.publish
    if "ranks" in inspect.signature(publish).parameters:
        publish(server_args, role="scheduler", ranks=runtime_context.SpawnRanks(world_rank=rank))
    else:
        publish(server_args, role="scheduler")
    parallel_state.init_distributed_environment(size, rank, f"file://{meeting}", local_rank=rank, backend="gloo")
    sizes = {"tensor_model_parallel_size": size, "expert_model_parallel_size": arguments.get("ep_size", 1)}
    makes: Any = parallel_state.initialize_model_parallel
    makes(**{name: value for name, value in sizes.items() if name in inspect.signature(makes).parameters})
    config = {"server_args": server_args, "model_config": ModelConfig.from_server_args(server_args)}
    begin: Any = dp_attention.initialize_dp_attention
    begin(**{name: value for name, value in config.items() if name in inspect.signature(begin).parameters})


def load(path: Path, *, drafter: bool = False) -> Any:
    """The class SGLang builds for a checkpoint, loaded by SGLang's own loader in float32."""
    config = model_config(path, drafter)
    return get_model(model_config=config, load_config=LoadConfig(), device_config=DeviceConfig("cpu"))


def model_config(path: Path, drafter: bool = False) -> ModelConfig:
    """What SGLang makes of a checkpoint's config.json."""
    return ModelConfig.from_server_args(runtime_context.get_server_args(), model_path=str(path), is_draft_model=drafter)


def run(
    model: Any, sequences: Sequence[Sequence[int]], hidden: torch.Tensor | None = None, pool: Any = None
) -> list[torch.Tensor]:
    """Hidden states behind the final norm of each sequence, all in one prefill.

    hidden: a drafter's input. pool: SGLang's, which takes keys and values in slots that count from 1.
    """
    lengths = [len(sequence) for sequence in sequences]
    tokens = torch.tensor([token for sequence in sequences for token in sequence])
    positions = torch.cat([torch.arange(length) for length in lengths])
    batch = SimpleNamespace(
        forward_mode=ForwardMode.EXTEND,
        global_num_token_non_padded_cpu=len(tokens),
        spec_info=SimpleNamespace(hidden_states=hidden),
        out_cache_loc=torch.arange(1, 1 + len(tokens)),
    )
    with torch.no_grad(), forward_context(ForwardContext(attn_backend=_WholeBatch(lengths, pool))):
        return list(model.model(tokens, positions, batch).split(lengths))


class _WholeBatch:
    """An attention backend for one prefill of whole sequences."""

    def __init__(self, lengths: Sequence[int], pool: Any) -> None:
        self.lengths, self.token_to_kv_pool = list(lengths), pool
        ends = torch.tensor(self.lengths).cumsum(0).int()
        self.starts, self.ends = ends - torch.tensor(self.lengths, dtype=torch.int32), ends

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        return self._linear(**kwargs) if "mixed_qkv" in kwargs else self._full(*args)

    def _full(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, layer: Any, forward_batch: Any, save_kv_cache: bool
    ) -> torch.Tensor:
        if save_kv_cache and self.token_to_kv_pool is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, forward_batch.out_cache_loc, k, v)
        q, k, v = (x.reshape(len(x), -1, layer.head_dim).transpose(0, 1) for x in (q, k, v))
        attend = partial(functional.scaled_dot_product_attention, is_causal=True, scale=layer.scaling, enable_gqa=True)
        sequences = (x.split(self.lengths, dim=1) for x in (q, k, v))
        outputs = [attend(*parts) for parts in zip(*sequences, strict=True)]
        return torch.cat(outputs, dim=1).transpose(0, 1).flatten(1)

    def _linear(
        self, layer: Any, forward_batch: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor
    ) -> torch.Tensor:
        count = len(self.lengths)
        slots = torch.arange(count, dtype=torch.int32)
        parameters = layer.core_parameters()
        conv_dim, width = parameters.conv_weight.shape
        out = torch.full((1, len(mixed_qkv), layer.num_v_heads, layer.head_v_dim), float("nan"))
        gdn_step(
            mixed_qkv,
            a,
            b,
            parameters,
            torch.full((count, conv_dim, width - 1), float("nan")),
            torch.full((count, layer.num_v_heads, layer.head_v_dim, layer.head_k_dim), float("nan")),
            out[0],
            prefill=PrefillRows(self.starts, self.ends, slots, torch.zeros(count, dtype=torch.bool), max(self.lengths)),
            recurrent=None,
        )
        return out


def spawn(function: Any, count: int, *arguments: Any) -> None:
    """Run ``function(rank, *arguments)`` in processes of their own; raises what one of them raised."""
    torch.multiprocessing.spawn(function, arguments, nprocs=count)
