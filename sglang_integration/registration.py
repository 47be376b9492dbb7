"""Everything this plugin hangs into SGLang, in one place, and what it relies on there.

SGLang logs a hook that cannot be applied and starts without it. So every hook is tried out as soon as SGLang has
applied them all, by calling SGLang's own name with a probe that only a hook of ours answers.
"""

from __future__ import annotations

import functools
import pkgutil
from collections.abc import Callable
from importlib import import_module
from typing import Any

import sglang
import torch

from qwen3next_plugin.compat import Reliance, check_engine, check_reliances
from qwen3next_plugin.errors import RegistrationError
from qwen3next_plugin.settings import Settings

from .refusal import end, refusing

_MODELS = {
    "Qwen3NextForCausalLM": (f"{__package__}.model", "Qwen3NextForCausalLM"),
    "Qwen3NextForCausalLMMTP": (f"{__package__}.mtp", "Qwen3NextForCausalLMMTP"),
}
_GDN_BACKEND = "sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend"
_HYBRID = "sglang.srt.layers.attention.hybrid_linear_attn_backend"
_MODEL_CONFIG = "sglang.srt.configs.model_config.ModelConfig"
_ARCHITECTURE = "sglang.srt.model_loader.utils.get_model_architecture"
_POOLS = "sglang.srt.mem_cache"
_STATE_BUDGET = f"{_POOLS}.kv_cache_configurator.KVCacheConfigurator._handle_max_mamba_cache"
_STATE_POOL = f"{_POOLS}.memory_pool.HybridReqToTokenPool._init_mamba_pool"
_UNIFIED_POOL = f"{_POOLS}.unified_memory_pool.UnifiedHybridReqToTokenPool._init_mamba_pool"
_GRAPHS = "sglang.srt.model_executor.model_runner.ModelRunner.init_cuda_graphs"
_COMMIT = f"{_HYBRID}.HybridLinearAttnBackend.update_mamba_state_after_mtp_verify"
_AROUND = {  # to functions of this package
    f"{_MODEL_CONFIG}._derive_context_length": "checks.derive_context_length",
    f"{_MODEL_CONFIG}._verify_quantization": "checks.verify_quantization",
    f"{_MODEL_CONFIG}.from_server_args": "checks.model_config_from",
    _ARCHITECTURE: "checks.model_architecture",
    _STATE_BUDGET: "drafts.handle_max_mamba_cache",
    _STATE_POOL: "drafts.init_mamba_pool",
    _UNIFIED_POOL: "drafts.init_mamba_pool",
    _COMMIT: "drafts.update_mamba_state_after_mtp_verify",
    _GRAPHS: "warmup.init_cuda_graphs",
}
TARGETS = (_GDN_BACKEND, *_AROUND)

RELIANCES = [
    Reliance("sglang.srt.plugins.hook_registry.HookRegistry", "to hang in hooks", attributes=("register",)),
    Reliance("sglang.srt.plugins.hook_registry.HookRegistry.apply_hooks", "to see that its hooks were applied"),
    Reliance("sglang.srt.plugins.hook_registry.HookType", "to hang in hooks", attributes=("REPLACE", "AROUND")),
    Reliance("sglang.srt.models.registry.ModelRegistry.models", "to put our classes in the models' place"),
    Reliance(_GDN_BACKEND, "to run the recurrent layers on our kernels"),
    Reliance(
        f"{_HYBRID}.MambaAttnBackendBase",
        "to hold what captured batches read",
        attributes=("init_cuda_graph_state", "init_forward_metadata_out_graph", "init_forward_metadata_in_graph"),
    ),
    Reliance(
        _COMMIT,
        "to commit accepted drafts",
        parameters=("last_correct_step_indices", "mamba_track_indices", "mamba_steps_to_track"),
    ),
    Reliance(_GRAPHS, "to compile kernels before graphs are captured"),
    Reliance("sglang.srt.model_executor.forward_context.get_attn_backend", "to find the pool of keys and values"),
    Reliance(
        "sglang.srt.mem_cache.memory_pool.MHATokenToKVPool", "to write keys and values", attributes=("get_kv_buffer",)
    ),
    Reliance(
        "sglang.srt.layers.radix_attention.RadixAttention.forward",
        "to write keys and values in its place",
        parameters=("q", "k", "v", "forward_batch", "save_kv_cache"),
    ),
    Reliance(_STATE_BUDGET, "to give the memory of drafts' states to requests", parameters=("total_rest_memory",)),
    Reliance(
        f"{_POOLS}.kv_cache_configurator.KVCacheConfigurator",
        "to give the memory of drafts' states to requests",
        parameters=("model_config", "spec_algorithm"),
        attributes=("mambaish_config",),
    ),
    Reliance("sglang.srt.speculative.spec_info.SpeculativeAlgorithm", "to size its states", attributes=("NONE",)),
    Reliance("sglang.srt.runtime_context.max_speculative_num_draft_tokens", "to record that many drafts a request"),
    Reliance(
        "sglang.srt.configs.mamba_utils.Mamba2CacheParams",
        "to size what drafts leave behind",
        parameters=("shape", "layers", "dtype"),
    ),
    Reliance(
        "sglang.srt.mem_cache.memory_pool.HybridReqToTokenPool",
        "to find a request's states",
        attributes=("get_mamba_indices", "translate_mamba_indices", "mamba2_layer_cache"),
    ),
    *(
        Reliance(
            pool,
            "to keep records of drafts in place of states",
            parameters=("cache_params", "mamba_spec_state_size", "speculative_num_draft_tokens", "device"),
        )
        for pool in (_STATE_POOL, _UNIFIED_POOL)
    ),
    Reliance("sglang.srt.mem_cache.memory_pool.MambaPool.State", "to find the states", parameters=("conv", "temporal")),
    Reliance(
        "sglang.srt.model_executor.forward_batch_info.ForwardBatch",
        "to find a step's rows, and where the radix tree wants states",
        parameters=(
            *("extend_start_loc", "extend_seq_lens", "extend_prefix_lens", "extend_seq_lens_cpu"),
            *("mamba_track_indices", "mamba_track_mask"),
        ),
        attributes=("mamba_track_aligned_lens",),
    ),
    Reliance(
        f"{_MODEL_CONFIG}._derive_context_length", "to complete the rope before it", parameters=("context_length",)
    ),
    Reliance(f"{_MODEL_CONFIG}._verify_quantization", "to run packed integers on our layers"),
    Reliance(
        "sglang.srt.layers.quantization",
        "to run packed integers on our layers",
        attributes=("QUANTIZATION_METHODS", "CPU_QUANTIZATION_METHODS"),
    ),
    Reliance(f"{_MODEL_CONFIG}.from_server_args", "to check the checkpoint", parameters=("server_args",)),
    Reliance(_ARCHITECTURE, "to see which class is built", parameters=("model_config",)),
    Reliance("sglang.srt.utils.hf_transformers.config.HfModelConfigParser.parse", "to read config.json as SGLang does"),
    Reliance("sglang.srt.configs.model_config_parser_registry._MODEL_CONFIG_PARSER_REGISTRY", "to check config.json"),
    Reliance("sglang.srt.utils.hf_transformers.common._CONFIG_REGISTRY", "to read layer_types"),
    Reliance(
        "sglang.srt.configs.qwen3_next.Qwen3NextConfig",
        "to tell SGLang each layer's kind",
        attributes=("layers_block_type", "linear_layer_ids", "full_attention_layer_ids", "mamba2_cache_params"),
    ),
    Reliance(
        "sglang.srt.configs.qwen3_next.HybridLayerType",
        "to tell SGLang each layer's kind",
        attributes=("full_attention", "linear_attention"),
    ),
    Reliance(
        "sglang.srt.layers.quantization.base_config.LinearMethodBase.apply",
        "to run few rows through our product",
        parameters=("layer", "x", "bias"),
    ),
    Reliance("sglang.srt.environ.envs.SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN", "to respect it"),
]

_PROBE = object()


def activate(settings: Settings) -> None:
    """Checks the engine, then registers models, config classes and hooks. Safe to repeat.

    Raises UnsupportedEngineError, DriftError, SettingsError or RegistrationError; SGLang is unchanged but for the last.
    """
    check_engine("sglang", sglang.__version__)
    check_reliances(RELIANCES)
    settings.check_device("cuda" if torch.cuda.is_available() else "cpu")
    settings.tell_kernels()
    _register_classes()
    _register_hooks()


def _register_classes() -> None:
    from sglang.srt.configs.model_config_parser_registry import _MODEL_CONFIG_PARSER_REGISTRY
    from sglang.srt.models.registry import ModelRegistry
    from sglang.srt.utils.hf_transformers.common import _CONFIG_REGISTRY

    from . import quantization
    from .config import MODEL_TYPE, CheckedConfigParser, LayerTypesConfig

    quantization.register()
    for architecture, (module, name) in _MODELS.items():
        ModelRegistry.models[architecture] = getattr(import_module(module), name)
    _CONFIG_REGISTRY[MODEL_TYPE] = LayerTypesConfig
    _MODEL_CONFIG_PARSER_REGISTRY["hf"] = CheckedConfigParser


@functools.cache
def _register_hooks() -> None:
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from .gdn_backend import make_gdn_backend

    HookRegistry.register(_GDN_BACKEND, _guarded(make_gdn_backend, 0), HookType.REPLACE)
    for target, name in _AROUND.items():
        hook = pkgutil.resolve_name(f"{__package__}.{name}")
        HookRegistry.register(target, _guarded(hook, 1), HookType.AROUND)
    _verify_after(HookRegistry)


def _guarded(hook: Callable[..., Any], subject: int) -> Callable[..., Any]:
    """The hook, refusing what it raises, and answering the probe where argument number ``subject`` would be a model."""
    hook = refusing(hook)

    @functools.wraps(hook)
    def guarded(*args: Any, **kwargs: Any) -> Any:
        return _PROBE if args[subject : subject + 1] == (_PROBE,) else hook(*args, **kwargs)

    return guarded


def _verify_after(registry: Any) -> None:
    """Look at everything again when SGLang, which calls no plugin then, has applied all plugins' hooks."""
    apply_hooks = registry.apply_hooks

    def apply_and_verify() -> None:
        apply_hooks()
        try:
            verify()
        except RegistrationError as error:
            end(error)

    registry.apply_hooks = staticmethod(apply_and_verify)


def verify() -> None:
    """Raise RegistrationError for a hook that is not in force or a model class that another plugin put in its place."""
    from sglang.srt.models.registry import ModelRegistry

    for target in TARGETS:
        if not _answers(target):
            raise RegistrationError(f"the hook on {target} is not in force: {_remedy()}.")
    for architecture, (module, name) in _MODELS.items():
        found = ModelRegistry.models.get(architecture)
        if found is not getattr(import_module(module), name):
            raise RegistrationError(
                f"{architecture} is {found} in SGLang's registry, not {module}.{name}: {_remedy()}."
            )


def _answers(target: str) -> bool:
    try:
        function = pkgutil.resolve_name(target)
        arguments = (_PROBE, None) if target.endswith("_derive_context_length") else (_PROBE,)
        return function(*arguments) is _PROBE
    except Exception:
        return False


def _remedy() -> str:
    return "keep other plugins out with SGLANG_PLUGINS=qwen3next, or set QWEN3NEXT_PLUGIN=0 to run the stock engine"
