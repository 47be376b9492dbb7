"""What is named in one place for modules of this folder that do not import each other."""

GDN_CORE_OP = "vllm::qwen3next_plugin_gdn_core"
ATTENTION_OP = "vllm::qwen3next_plugin_attention"
SPLITTING_OPS = (GDN_CORE_OP, ATTENTION_OP)
"""Split vLLM's piecewise CUDA graphs: their work depends on the step's rows, so it is not captured with the rest."""
