"""Engines' own kernels, called as their stock layers call them. An adapter is imported only when it is asked for.

The name of an engine stands for what its stock layer runs on a Hopper GPU; longer names for what its flags or another
config file could make of it. A function of an adapter takes a `Work` and gives what to time, alternatives in a list.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

from ..work import Engine, Prepared, Work

Prepare = Callable[[Work], list[Prepared]]

_ADAPTERS: dict[tuple[str, str], tuple[str, dict[str, str]]] = {
    ("vllm", "gdn-decode"): ("vllm_gdn", {"vllm": "decode", "vllm-flashinfer": "decode_flashinfer"}),
    ("vllm", "gdn-verify"): ("vllm_gdn", {"vllm": "verify", "vllm-cuda": "verify_cuda"}),
    ("vllm", "gdn-prefill"): ("vllm_gdn", {"vllm": "prefill", "vllm-triton": "prefill_triton"}),
    ("vllm", "conv-prefill"): ("vllm_gdn", {"vllm": "convolution"}),
    ("vllm", "norm-add"): ("vllm_layers", {"vllm": "norm", "vllm-inductor": "norm_compiled"}),
    ("vllm", "qk-norm-rope-write"): ("vllm_layers", {"vllm": "rope"}),
    ("vllm", "dense"): (
        "vllm_layers",
        {"vllm": "dense", "vllm-deepgemm": "dense_deepgemm", "vllm-cutlass": "dense_cutlass"},
    ),
    ("vllm", "moe"): ("vllm_moe", {"vllm": "default", "vllm-other-config": "other_configs"}),
    ("sglang", "gdn-decode"): ("sglang_gdn", {"sglang": "decode", "sglang-flashinfer": "decode_flashinfer"}),
    ("sglang", "gdn-verify"): ("sglang_gdn", {"sglang": "verify", "sglang-flashinfer": "verify_flashinfer"}),
    ("sglang", "gdn-prefill"): ("sglang_gdn", {"sglang": "prefill", "sglang-triton": "prefill_triton"}),
    ("sglang", "conv-prefill"): ("sglang_gdn", {"sglang": "convolution"}),
    ("sglang", "norm-add"): ("sglang_layers", {"sglang": "norm"}),
    ("sglang", "qk-norm-rope-write"): ("sglang_layers", {"sglang": "rope"}),
    ("sglang", "dense"): ("sglang_layers", {"sglang": "dense", "sglang-triton": "dense_triton"}),
    ("sglang", "moe"): (
        "sglang_moe",
        {"sglang": "joined", "sglang-h200-config": "joined_h200", "sglang-routed": "routed"},
    ),
}


def named(path: str) -> Any:
    """What is called ``module:attribute`` in the engine at hand. Raises ImportError or AttributeError."""
    module, _, attribute = path.partition(":")
    return getattr(importlib.import_module(module), attribute)


def peers_of(engine: Engine, op: str) -> Iterator[tuple[str, Prepare]]:
    """Names of an engine's implementations of an operation, and what prepares them."""
    module, functions = _ADAPTERS[engine, op]
    for name, function in functions.items():

        def prepare(work: Work, function: str = function) -> list[Prepared]:
            found: Prepare = getattr(importlib.import_module(f".{module}", __name__), function)
            return found(work)

        yield name, prepare
