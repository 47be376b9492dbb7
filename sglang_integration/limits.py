"""What SGLang can be asked for and this model does not do, refused before anything is loaded.

Each would otherwise be served wrongly or die far from its cause: SGLang leaves most of it to the model's own code.
"""

from __future__ import annotations

from dataclasses import dataclass

from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.weights_layout import FP8_BLOCK

_AS_IT_IS = (None, "unquant")
_STOCK = "or set QWEN3NEXT_PLUGIN=0 to run the stock engine"


@dataclass(frozen=True)
class Limit:
    """Fields of ServerArgs, what they may hold beside nothing, and what to do instead of anything else."""

    fields: tuple[str, ...]
    remedy: str
    served: tuple[object, ...] = ()


_ONE_GROUP = "this model is split by --tp-size and --ep-size alone, drop it"
_DRAFTS = "this model drafts with its own MTP layer in a chain, use --speculative-algorithm NEXTN with top-k 1"
_EXPERTS = "this model keeps each expert once, in the checkpoint's order and in its own kernels, drop it"
_ADAPTERS = "q, k, v and z are re-laid at load and adapters are not, merge the adapter into the checkpoint"

LIMITS = (
    Limit(("pp_size", "dcp_size", "moe_dp_size", "dwdp_size", "attn_cp_size"), _ONE_GROUP, served=(1,)),
    Limit(("enable_prefill_cp", "enable_layernorm_sp", "enable_attn_tp_input_scattered"), _ONE_GROUP),
    Limit(("enable_dp_attention",), _ONE_GROUP),
    Limit(("enable_lora", "lora_paths"), _ADAPTERS),
    Limit(("speculative_algorithm",), _DRAFTS, served=("NEXTN", "EAGLE")),
    Limit(("speculative_eagle_topk",), _DRAFTS, served=(1,)),
    Limit(("moe_a2a_backend",), _EXPERTS, served=("none",)),
    Limit(("init_expert_location",), _EXPERTS, served=("trivial",)),
    Limit(("enable_eplb", "ep_num_redundant_experts", "elastic_ep_backend"), _EXPERTS),
    Limit(("expert_distribution_recorder_mode", "kt_weight_path"), _EXPERTS),
    Limit(
        ("enable_two_batch_overlap", "enable_single_batch_overlap", "enable_pdmux"),
        "this model runs a step as one batch, drop it",
    ),
)

# Not in 0.5.20.
LATER_LIMITS = (
    Limit(("attn_dp_size",), _ONE_GROUP, served=(1,)),
    Limit(("enable_return_aux_hidden_states",), "this model returns its last hidden states only, drop it"),
)


def check_supported(spec: Qwen3NextSpec, server_args: ServerArgs) -> None:
    """Raise ConfigError, one sentence with the flag in it, for the first thing asked that this model does not do."""
    for limit in LIMITS + LATER_LIMITS:
        for field in limit.fields:
            value = getattr(server_args, field, None)
            if value and value not in limit.served:
                raise _refused(field, value, limit.remedy)
    if server_args.ep_size not in (1, server_args.tp_size):
        raise _refused("ep_size", server_args.ep_size, f"give 1 or --tp-size ({server_args.tp_size})")
    _check_quantisation(spec, server_args.quantization)


def _check_quantisation(spec: Qwen3NextSpec, asked: str | None) -> None:
    quant = spec.quant
    if quant is None:
        if asked not in _AS_IT_IS:
            raise _refused("quantization", asked, "weights are not quantised while loading, give an FP8 checkpoint")
        return
    if quant.rules:
        return  # `quantization.check_asked` looks at those
    if quant.method != "fp8" or quant.weight_block_size != (FP8_BLOCK, FP8_BLOCK):
        block = "" if quant.weight_block_size is None else f" with blocks {list(quant.weight_block_size)}"
        served = f"bf16, fp8 with weight_block_size [{FP8_BLOCK}, {FP8_BLOCK}], AWQ, GPTQ and compressed-tensors"
        remedy = f"{served} are served, use such a checkpoint"
        raise ConfigError(f"quantization_config is {quant.method}{block}: {remedy}, {_STOCK}.", "quantization_config")
    if asked not in (*_AS_IT_IS, "fp8"):
        raise _refused("quantization", asked, "the checkpoint is fp8, drop it")


def _refused(field: str, value: object, remedy: str) -> ConfigError:
    flag = "--" + field.replace("_", "-")
    return ConfigError(f"{flag} is {value}: {remedy}, {_STOCK}.", field)
