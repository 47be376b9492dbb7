"""Where tokens lie in the KV cache: rows of the request table and slots of the pool."""

import ctypes

from torch import Tensor


def assign_req_to_token_pool_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """``req_to_token[request, start:end]`` takes the next slots of ``out_cache_loc``, request after request.

    Requests, starts and ends are ``[N]``, the table ``[R, pool_len]``, the slots ``[sum(end - start)]``; in place.
    """
    taken = 0
    for request, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        req_to_token[request, first:last] = out_cache_loc[taken : taken + last - first].to(req_to_token.dtype)
        taken += last - first


def assign_extend_cache_locs_cpu(
    req_pool_indices: Tensor, req_to_token: Tensor, start: Tensor, end: Tensor, out_cache_loc: Tensor, pool_len: int
) -> None:
    """The way back: ``out_cache_loc`` takes ``req_to_token[request, start:end]``, request after request; in place."""
    taken = 0
    for request, first, last in zip(req_pool_indices.tolist(), start.tolist(), end.tolist(), strict=True):
        out_cache_loc[taken : taken + last - first] = req_to_token[request, first:last].to(out_cache_loc.dtype)
        taken += last - first


def copy_all_layer_kv_cache_cpu(data_ptrs: Tensor, strides: Tensor, tgt_loc: Tensor, src_loc: Tensor) -> None:
    """Copy slots ``src_loc`` to ``tgt_loc`` in every buffer; all are read before one is written.

    ``data_ptrs [B]`` are addresses of buffers and ``strides [B]`` bytes a slot, as the engine's kernel takes them.
    """
    targets, sources = tgt_loc.tolist(), src_loc.tolist()
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        rows = [ctypes.string_at(address + slot * stride, stride) for slot in sources]
        for slot, row in zip(targets, rows, strict=True):
            ctypes.memmove(address + slot * stride, row, stride)
