"""Speculative decoding with chains of drafts (top-k 1): what is asked, what is accepted, where it lies."""

import torch
from torch import Tensor


def build_tree_kernel_efficient_cpu(
    parent_list: Tensor,
    selected_index: Tensor,
    seq_lens: Tensor,
    tree_mask: Tensor,
    positions: Tensor,
    retrieve_index: Tensor,
    retrieve_next_token: Tensor,
    retrieve_next_sibling: Tensor,
    topk: int,
    depth: int,
    draft_token_num: int,
    mode: int,
) -> None:
    """Lay out N chains of ``draft_token_num`` = M tokens behind ``seq_lens [N]`` tokens; fills its outputs in place.

    ``positions [N * M]`` count on from the sequence, ``retrieve_index [N, M]`` numbers the tokens,
    ``next_token [N, M]`` points at the next of the chain (-1 at its end), siblings are -1. The mask is causal,
    ``[N, M, M]``: the verified part of a sequence is left out (SGLang asks for that mode on a CPU).
    """
    if topk != 1:
        raise NotImplementedError(
            "build_tree_kernel_efficient_cpu: draft trees have no stand-in, only chains (top-k 1)"
        )
    rows, length = seq_lens.shape[0], draft_token_num
    steps = torch.arange(length)
    positions.copy_((seq_lens.view(-1, 1) + steps).reshape(-1).to(positions.dtype))
    retrieve_index.copy_(torch.arange(rows * length).view(rows, length))
    retrieve_next_token.copy_(torch.where(steps + 1 < length, steps + 1, -1).expand(rows, length))
    retrieve_next_sibling.fill_(-1)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    tree_mask.view(-1)[: rows * length * length].copy_(causal.expand(rows, length, length).reshape(-1))


def verify_tree_greedy_cpu(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    target_predict: Tensor,
) -> None:
    """Accept each chain as far as its tokens are what the model itself would have said; fills its outputs in place.

    ``candidates [N, M]`` (token 0 is already certain), ``target_predict [N * M]`` the model's token after each of them.
    ``accept_index [N, M']`` takes the numbers of the accepted tokens (the rest of a row stays as it is),
    ``accept_token_num [N]`` how many drafts they are, and ``predicts`` the model's token after each accepted one.
    """
    rows, length = candidates.shape
    said = target_predict.view(rows, -1)
    for row in range(rows):
        accept_index[row, 0] = retrive_index[row, 0]
        at = 0
        while at + 1 < min(length, accept_index.shape[1]) and int(candidates[row, at + 1]) == int(said[row, at]):
            predicts[int(retrive_index[row, at])] = said[row, at]
            at += 1
            accept_index[row, at] = retrive_index[row, at]
        accept_token_num[row] = at
        predicts[int(retrive_index[row, at])] = said[row, at]


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices: Tensor,
    req_to_token: Tensor,
    seq_lens: Tensor,
    out_cache_loc: Tensor,
    pool_len: int,
    topk: int,
    num_cols: int,
) -> None:
    """``out_cache_loc`` takes each request's ``topk * num_cols`` slots behind its sequence; in place."""
    count = topk * num_cols
    for row, (request, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        slots = req_to_token[request, length : length + count]
        out_cache_loc[row * count : (row + 1) * count] = slots.to(out_cache_loc.dtype)


def fill_bonus_tokens_cpu(accept_tokens: Tensor, accept_lens: Tensor, bonus_tokens: Tensor, stride: int) -> None:
    """``bonus_tokens [N]`` takes the last accepted token of each row of ``accept_tokens [N * stride]``; in place."""
    last = torch.arange(accept_lens.shape[0]) * stride + accept_lens.long() - 1
    bonus_tokens.copy_(accept_tokens.view(-1)[last].to(bonus_tokens.dtype))


def fill_accept_out_cache_loc_cpu(accept_index: Tensor, out_cache_loc: Tensor, accept_out_cache_loc: Tensor) -> None:
    """The slots of accepted tokens move to the front: those of ``accept_index`` that are not -1, in order; in place."""
    accepted = accept_index.view(-1)
    slots = out_cache_loc[accepted[accepted > -1].long()]
    accept_out_cache_loc[: slots.numel()] = slots.to(accept_out_cache_loc.dtype)
