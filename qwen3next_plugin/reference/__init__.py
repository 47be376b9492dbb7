"""The whole of Qwen3-Next in plain torch: the oracle that every test of this project is measured against.

``layers`` holds one function a formula, ``model`` puts them together over the fused weights of
``qwen3next_plugin.weights``, and ``generate`` decodes greedily and drafts with the MTP head. Everything is
differentiable and runs in float32, float64 or bfloat16; it is written to be read, not to be fast.
"""

from .cache import LayerState, ReferenceCache
from .generate import DraftStatistics, Generation, accept_drafts, generate_greedy
from .model import ReferenceModel

__all__ = [
    "DraftStatistics",
    "Generation",
    "LayerState",
    "ReferenceCache",
    "ReferenceModel",
    "accept_drafts",
    "generate_greedy",
]
