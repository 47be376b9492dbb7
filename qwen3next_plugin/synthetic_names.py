"""How engines are told to make their weights (no torch here: command lines read it)."""

LOAD_FORMAT = "qwen3next-synthetic"
"""vLLM: ``--load-format qwen3next-synthetic``."""

SGLANG_FLAGS = ("--load-format", "dummy", "--model-loader-extra-config", '{"weights": "qwen3next-synthetic"}')
"""SGLang's load formats are a closed list, and its dummy loader takes no extra config: together they mean ours."""
