"""The stand-ins are installed only in the SGLang environments for a CPU; elsewhere there is nothing to test."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("qwen3next_sglang_cpu_standins") else ["test_*.py"]
