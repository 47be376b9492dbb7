"""Everything this plugin hangs into vLLM, in one place, and what it relies on there."""

from __future__ import annotations

import vllm

from qwen3next_plugin.compat import Reliance, check_engine, check_reliances
from qwen3next_plugin.settings import Settings

from .names import SPLITTING_OPS

PACKAGE = __package__
_MAMBA = "model_executor.layers.mamba.mamba_utils"

RELIANCES = [
    Reliance(f"vllm.{path}", why)
    for path, why in (
        ("model_executor.models.registry.ModelRegistry.register_model", "to put our classes in the models' place"),
        ("model_executor.models.config.MODELS_CONFIG_MAP", "to check the checkpoint before anything starts"),
        ("transformers_utils.config._CONFIG_FORMAT_TO_CONFIG_PARSER", "to check config.json as it was written"),
        ("transformers_utils.config.HFConfigParser.parse", "to read config.json as vLLM does"),
        ("config.model.MODEL_ARCH_CONFIG_CONVERTORS", "to complete the rope before the context length is derived"),
        ("transformers_utils.model_arch_config_convertor.ModelArchConfigConvertorBase.convert", "to complete the rope"),
        ("config.VllmConfig._set_cudagraph_sizes", "to capture CUDA graphs for prompts, too"),
        ("config.CompilationConfig._attention_ops", "to keep what depends on rows out of piecewise CUDA graphs"),
        ("utils.torch_utils.direct_register_custom_op", "to hide what depends on rows from torch.compile"),
        ("compilation.breakable_cudagraph.eager_break_during_capture", "to keep it out of segmented CUDA graphs, too"),
        ("model_executor.layers.attention.attention.get_attention_context", "to find a step's cache and its slots"),
        ("model_executor.layers.attention.attention.unified_attention_with_output", "to attend over the cache"),
        ("model_executor.layers.mamba.abstract.MambaBase.get_kv_cache_spec", "to give our layer state blocks"),
        (f"{_MAMBA}.MambaStateShapeCalculator.gated_delta_net_state_shape", "to lay out a state block"),
        (
            f"{_MAMBA}.MambaStateCopyFuncCalculator.gated_delta_net_state_copy_func",
            "to let the prefix cache copy states",
        ),
        ("v1.attention.backends.gdn_attn.GDNAttentionMetadataBuilder", "to be handed the accepted tokens of a step"),
        ("model_executor.layers.quantization.register_quantization_config", "to run packed integers on our layers"),
        ("v1.attention.backends.utils.mamba_get_block_table_tensor", "to find a request's state blocks"),
    )
] + [
    Reliance(
        "vllm.model_executor.layers.linear.LinearMethodBase.apply",
        "to run few rows through our product",
        parameters=("layer", "x", "bias"),
    )
]


def activate(settings: Settings) -> None:
    """Checks the engine, then registers models, checks, graph-splitting op and CPU kernels. Safe to repeat.

    Raises UnsupportedEngineError, DriftError or SettingsError before anything is changed.
    """
    check_engine("vllm", vllm.__version__)
    check_reliances(RELIANCES)

    from vllm.config import CompilationConfig
    from vllm.config.model import MODEL_ARCH_CONFIG_CONVERTORS
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.platforms import current_platform
    from vllm.transformers_utils import config as config_parsers

    from .checks import MODEL_TYPE, CheckedCheckpoint, CheckedConfigParser
    from .rope import RopeCompletingConvertor

    settings.check_device(current_platform.device_type)
    settings.tell_kernels()

    # By name, so that vLLM inspects the classes in a subprocess and this one stays free of CUDA.
    ModelRegistry.register_model("Qwen3NextForCausalLM", f"{PACKAGE}.model:Qwen3NextForCausalLM")
    ModelRegistry.register_model("Qwen3NextMTP", f"{PACKAGE}.mtp:Qwen3NextMTP")
    MODELS_CONFIG_MAP["Qwen3NextForCausalLM"] = CheckedCheckpoint
    config_parsers._CONFIG_FORMAT_TO_CONFIG_PARSER["hf"] = CheckedConfigParser
    MODEL_ARCH_CONFIG_CONVERTORS[MODEL_TYPE] = RopeCompletingConvertor
    for op in SPLITTING_OPS:
        if op not in CompilationConfig._attention_ops:
            CompilationConfig._attention_ops.append(op)
    if current_platform.is_cpu():
        from .cpu_mamba import register_cpu_kernels

        register_cpu_kernels()
