"""Content of the stand-ins for ``sgl_kernel`` and ``sgl_kernel.mamba``: functions, and ``torch.ops.sgl_kernel.*``.

SGLang imports some operations by name and calls others through ``torch.ops``; both find the same functions. Names that
it only imports (for other models) can be imported and fail when called.
"""

from collections.abc import Callable
from typing import Any

import torch

from .ops.drafts import (
    assign_draft_cache_locs_contiguous_cpu,
    build_tree_kernel_efficient_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    verify_tree_greedy_cpu,
)
from .ops.experts import topk_softmax_cpu
from .ops.gdn import (
    causal_conv1d_fn_cpu,
    causal_conv1d_update_cpu,
    chunk_gated_delta_rule_cpu,
    fused_gdn_gating_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
)
from .ops.slots import assign_extend_cache_locs_cpu, assign_req_to_token_pool_cpu, copy_all_layer_kv_cache_cpu

__version__ = "0.0.0"

OPERATIONS = (
    assign_draft_cache_locs_contiguous_cpu,
    assign_extend_cache_locs_cpu,
    assign_req_to_token_pool_cpu,
    build_tree_kernel_efficient_cpu,
    causal_conv1d_fn_cpu,
    causal_conv1d_update_cpu,
    chunk_gated_delta_rule_cpu,
    copy_all_layer_kv_cache_cpu,
    fill_accept_out_cache_loc_cpu,
    fill_bonus_tokens_cpu,
    fused_gdn_gating_cpu,
    fused_sigmoid_gating_delta_rule_update_cpu,
    topk_softmax_cpu,
    verify_tree_greedy_cpu,
)

for _operation in OPERATIONS:
    setattr(torch.ops.sgl_kernel, _operation.__name__, _operation)


def __getattr__(name: str) -> Callable[..., Any]:
    """Any other name: fine to import, an error to call."""
    if name.startswith("_") or name == "mamba":
        raise AttributeError(name)

    def missing(*arguments: Any, **options: Any) -> None:
        raise NotImplementedError(f"sgl_kernel.{name} has no stand-in on a CPU")

    return missing
