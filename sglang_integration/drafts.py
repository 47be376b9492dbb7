"""What SGLang keeps of a step's drafts: records of every token in place of the recurrent states after it.

SGLang's pool has room for the state after each draft of every running request, a multiple of the requests' own states.
Our verification leaves `DraftRecords`, about a fiftieth of it, and the commit applies what was accepted. Each function
here is an AROUND hook of SGLang's function of that name.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams
from sglang.srt.runtime_context import get_schedule, max_speculative_num_draft_tokens
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from qwen3next_plugin.kernels.gdn import DraftRecords

from .checks import is_qwen3_next
from .config import Qwen3NextCacheParams

logger = logging.getLogger("sglang.qwen3next_plugin")


def records_for(params: Mamba2CacheParams, rows: int, tokens: int, device: torch.device | str) -> DraftRecords:
    """Records of all recurrent layers on this rank; params are SGLang's sizes of a request's states."""
    ((conv_dim, _),) = params.shape.conv
    num_v_heads, head_v_dim, head_k_dim = params.shape.temporal
    return DraftRecords.allocate(
        len(params.layers),
        rows,
        tokens,
        num_k_heads=(conv_dim - num_v_heads * head_v_dim) // (2 * head_k_dim),
        num_v_heads=num_v_heads,
        head_k_dim=head_k_dim,
        head_v_dim=head_v_dim,
        input_dtype=params.dtype.conv,
        device=device,
    )


def handle_max_mamba_cache(original: Callable[..., float], configurator: Any, total_rest_memory: float) -> float:
    """Around KVCacheConfigurator._handle_max_mamba_cache, which divides the GiB that are left between states and KV.

    It is asked as if there were no drafts, after the records have been set aside: what SGLang would reserve for the
    drafts' states goes to requests and cached prefixes.
    """
    tokens = max_speculative_num_draft_tokens()
    if not is_qwen3_next(configurator.model_config) or configurator.spec_algorithm.is_none() or tokens is None:
        return original(configurator, total_rest_memory)
    rows = get_schedule().max_running_requests
    assert rows is not None, "SGLang gives every server with drafts a number of running requests"
    records = records_for(configurator.mambaish_config.mamba2_cache_params, rows, tokens, "meta").nbytes
    without_drafts = copy.copy(configurator)
    without_drafts.spec_algorithm = SpeculativeAlgorithm.NONE
    return original(without_drafts, total_rest_memory - records / 2**30)


def init_mamba_pool(original: Callable[..., None], request_pool: Any, **arguments: Any) -> None:
    """Around HybridReqToTokenPool._init_mamba_pool: Qwen3-Next's states, with records where SGLang keeps drafts'."""
    params, tokens = arguments["cache_params"], arguments.get("speculative_num_draft_tokens")
    if not isinstance(params, Qwen3NextCacheParams) or tokens is None:
        original(request_pool, **arguments)
        return
    original(request_pool, **(arguments | {"speculative_num_draft_tokens": None}))
    records = records_for(params, arguments["mamba_spec_state_size"], tokens, arguments["device"])
    request_pool.mamba_pool.draft_records = records
    logger.info("Drafts of %d requests are kept as records of %.2f GB.", records.inputs.shape[1], records.nbytes / 1e9)


def update_mamba_state_after_mtp_verify(
    original: Callable[..., None],
    hybrid_backend: Any,
    last_correct_step_indices: torch.Tensor,
    mamba_track_indices: torch.Tensor | None,
    mamba_steps_to_track: torch.Tensor | None,
    *args: Any,
    **kwargs: Any,
) -> None:
    """Around HybridLinearAttnBackend's: our backend's drafts are committed by it.

    last_correct_step_indices [rows]: each request's last accepted token in the step; mamba_track_indices and
    mamba_steps_to_track [rows]: where the radix tree wants a state and after which token, negative for none.
    """
    backend = hybrid_backend.linear_attn_backend
    commit = getattr(backend, "commit_drafts", None)
    tracked = (mamba_track_indices, mamba_steps_to_track)
    if commit is None:
        original(hybrid_backend, last_correct_step_indices, *tracked, *args, **kwargs)
        return
    commit(last_correct_step_indices, *tracked)
