"""A layer's whole verification of drafts in plain torch: by records, with their commit, or by a state a token."""

import torch
from torch import Tensor

from ..conv.reference import causal_conv1d_update, convolve
from ..norm.reference import rms_norm_gated
from .records import DraftRecords
from .reference import Gates, as_stored, compute_dtype, gdn_recurrent, split_tokens, step


def gdn_verify_fused(
    mixed_qkv: Tensor,
    z: Tensor,
    gates: Gates,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_state: Tensor,
    ssm_state: Tensor,
    record: DraftRecords,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    out: Tensor,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_verify_fused`; arguments are checked there.

    All rows go side by side; where one has ended it repeats its first token, of which nothing is kept.
    """
    out.zero_()
    lengths = torch.where(state_slots >= 0, query_end - query_start, 0).clamp(max=max_query_len)
    rows = (lengths[: record.inputs.shape[0]] > 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    order = torch.arange(int(lengths[rows].max()), device=out.device)
    inside = order < lengths[rows, None]
    tokens = query_start[rows, None].long() + torch.where(inside, order, 0)
    slots = state_slots[rows].long()
    a, b, A_log, dt_bias = gates

    inputs = mixed_qkv[tokens].to(compute_dtype(mixed_qkv))
    history = conv_state[slots, :, : conv_weight.shape[1] - 1].mT.to(inputs.dtype)
    convolved = convolve(torch.cat([history, inputs], dim=1), conv_weight, None, "silu")
    q, k, v, g, beta = split_tokens(convolved, (a[tokens], b[tokens], A_log, dt_bias), num_k_heads, ssm_state)
    state, outputs, writes = ssm_state[slots].to(inputs.dtype), [], []
    for j in range(len(order)):
        o, state, written = step(q[:, j], k[:, j], v[:, j], g[:, j], beta[:, j], state)
        outputs.append(o)
        writes.append(written)

    normed = rms_norm_gated(torch.stack(outputs, dim=1), z[tokens], norm_weight, norm_eps)
    out[tokens[inside]] = normed[inside].to(out.dtype)
    group = ssm_state.shape[1] // num_k_heads
    left = (inputs, k[:, :, ::group], torch.stack(writes, dim=1), g.exp())
    row, token = inside.nonzero(as_tuple=True)
    for kept, values in zip(record.tensors(), left, strict=True):
        kept[rows[row], token] = values[inside].to(kept.dtype)


def gdn_commit(
    conv_state: Tensor,
    ssm_state: Tensor,
    records: DraftRecords,
    state_slots: Tensor,
    last_tokens: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_commit`; arguments are checked there."""
    taken = torch.where(state_slots >= 0, last_tokens + 1, 0)
    rows = (taken[: records.inputs.shape[1]] > 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    taken, slots = taken[rows].long(), state_slots[rows].long()
    inputs, keys, writes, decays = (kept[:, rows].movedim(2, 0) for kept in records.tensors())
    keys = keys.repeat_interleave(writes.shape[3] // keys.shape[3], dim=3)
    state = ssm_state[:, slots].to(writes.dtype)
    window = conv_state[:, slots]
    columns = window.shape[3]
    for j in range(int(taken.max())):
        moved = decays[j, ..., None, None] * state + writes[j, ..., None] * keys[j, ..., None, :]
        shifted = torch.cat([window, inputs[j, ..., None].to(window.dtype)], dim=3)[..., -columns:]
        running = j < taken
        state = torch.where(running[:, None, None, None], moved, state)
        window = torch.where(running[:, None, None], shifted, window)
        if snapshot is not None:
            targets, after = (vector[rows].long() for vector in snapshot)
            kept = running & (targets >= 0) & (after == j)
            ssm_state[:, targets[kept]] = as_stored(state[:, kept], ssm_state.dtype)
            conv_state[:, targets[kept]] = window[:, kept]
    ssm_state[:, slots] = as_stored(state, ssm_state.dtype)
    conv_state[:, slots] = window


def gdn_verify_states(
    mixed_qkv: Tensor,
    z: Tensor,
    gates: Gates,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_state: Tensor,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    conv_slots: Tensor,
    initial_slots: Tensor,
    output_slots: Tensor,
    num_accepted_tokens: Tensor,
    out: Tensor,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_verify_states`; arguments are checked there."""
    rows, wide = (query_start, query_end), mixed_qkv.to(compute_dtype(mixed_qkv))
    convolved, core = torch.empty_like(wide), torch.empty(out.shape, dtype=wide.dtype, device=out.device)
    accepted = (num_accepted_tokens, max_query_len)
    causal_conv1d_update(wide, conv_weight, None, conv_state, *rows, conv_slots, *accepted, convolved, "silu", None)
    slots = (initial_slots, output_slots)
    gdn_recurrent(convolved, gates, ssm_state, num_k_heads, *rows, max_query_len, *slots, core, None)
    lengths = torch.where(initial_slots >= 0, query_end - query_start, 0).clamp(max=max_query_len)
    row, token = (torch.arange(max_query_len, device=out.device) < lengths[:, None]).nonzero(as_tuple=True)
    tokens = query_start[row].long() + token
    out.zero_()
    out[tokens] = rms_norm_gated(core[tokens], z[tokens], norm_weight, norm_eps).to(out.dtype)
