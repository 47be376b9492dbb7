"""Copies of recurrent states between slots, and which ones a verified chain asks for. SGLang has them in Triton."""

from typing import Any

import torch
from torch import Tensor


def track_mamba_states_if_needed(
    conv_states: Tensor,
    ssm_states: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """One layer: where the mask ``[N]`` says so, copy slot ``cache_indices[n]`` to slot ``mamba_track_indices[n]``.

    Slots below zero are freed or padding: nothing is copied from or to them. In place.
    """
    for row in range(batch_size):
        source, target = int(cache_indices[row]), int(mamba_track_indices[row])
        if bool(mamba_track_mask[row]) and source >= 0 and target >= 0:
            conv_states[target] = conv_states[source]
            ssm_states[target] = ssm_states[source]


def track_mamba_states_all_layers(
    conv_states_pool: Tensor,
    ssm_states_pool: Tensor,
    cache_indices: Tensor,
    mamba_track_mask: Tensor,
    mamba_track_indices: Tensor,
    batch_size: int,
    check_freed_slots: bool = False,
) -> None:
    """The same for pools ``[layers, slots, ...]``."""
    for conv_states, ssm_states in zip(conv_states_pool, ssm_states_pool, strict=True):
        track_mamba_states_if_needed(
            conv_states, ssm_states, cache_indices, mamba_track_mask, mamba_track_indices, batch_size
        )


def scatter_with_mask(
    dst: Tensor,
    src: Tensor,
    dst_indices_raw: Tensor,
    step_indices_raw: Tensor,
    src_indices_raw: Tensor | None = None,
) -> None:
    """Commit: ``dst[:, slot]`` takes the state after token ``step`` of its row, ``src[:, row, step]``; in place.

    Rows whose slot or step is below zero are left out. Row n reads ``src_indices_raw[n]``, or n itself (0.5.20).
    """
    rows = zip(dst_indices_raw.tolist(), step_indices_raw.tolist(), strict=True)
    for row, (slot, step) in enumerate(rows):
        if slot >= 0 and step >= 0:
            source = row if src_indices_raw is None else int(src_indices_raw[row])
            dst[:, slot] = src[:, source, step].to(dst.dtype)


def no_multi_scatter(pairs: Any) -> bool:
    """Never take the kernel that scatters several conv states at once: then each goes to `scatter_with_mask`."""
    return False


def fused_commit_track_indices(
    accept_index: Tensor,
    accept_lens: Tensor,
    seq_lens: Tensor | None,
    draft_token_num: int,
    mamba_track_interval: int,
) -> tuple[Tensor, Tensor | None]:
    """Which token's state of each chain becomes the sequence's, and which one a snapshot, ``[N]`` int64 both.

    The first is the last accepted token. A snapshot is due where the sequence passes a multiple of the interval: the
    state at that multiple; -1 where it does not, None altogether without ``seq_lens``.
    """
    rows = accept_lens.shape[0]
    offset = torch.arange(rows) * draft_token_num
    last = accept_index.gather(1, (accept_lens.long() - 1).unsqueeze(1)).squeeze(1).long() - offset
    if seq_lens is None:
        return last, None
    before = seq_lens.long()
    after = before + accept_lens.long()
    point = after // mamba_track_interval * mamba_track_interval
    at_point = accept_index.gather(1, (point - before - 1).clamp(min=0).unsqueeze(1)).squeeze(1).long() - offset
    passed = before // mamba_track_interval != after // mamba_track_interval
    return last, torch.where(passed, at_point, -1)
