"""The short causal convolution in plain torch: the formula, and the slot-addressed operations built from it.

A depthwise convolution over the last W inputs of every channel, followed by SiLU (Gated Delta Networks, arXiv
2412.06464, section 3.4).
"""

import torch
from torch import Tensor
from torch.nn import functional


def convolve(window: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    """Convolve ``window [..., T + W - 1, D]`` down to ``[..., T, D]``; the arithmetic keeps the window's dtype."""
    width = weight.shape[1]
    length = window.shape[-2] - width + 1
    taps = weight.to(window.dtype)
    y = window[..., :length, :] * taps[:, 0]
    for tap in range(1, width):
        y = y + window[..., tap : tap + length, :] * taps[:, tap]
    if bias is not None:
        y = y + bias.to(window.dtype)
    return functional.silu(y) if activation == "silu" else y


def _compute_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def causal_conv(
    x: Tensor,
    weight: Tensor,
    history: Tensor | None = None,
    bias: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and activation of whole sequences; differentiable.

    ``y[t, d] = silu(bias[d] + sum_w weight[d, w] * x[t - (W - 1) + w, d])`` with the ``history`` standing before ``x``.

    Args:
        x: ``[B, T, D]``, any float dtype; arithmetic in float32 (float64 for float64).
        weight: ``[D, W]``, oldest tap first.
        history: the W - 1 inputs before ``x``, oldest first, ``[B, W - 1, D]``; zeros if None.
        bias: ``[D]`` or None.
        activation: ``"silu"`` or None.

    Returns:
        ``y [B, T, D]`` and the last W - 1 inputs ``[B, W - 1, D]``, both in the dtype of ``x``.
    """
    width = weight.shape[1]
    if history is None:
        history = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    window = torch.cat([history.to(x.dtype), x], dim=1)
    y = convolve(window.to(_compute_dtype(x)), weight, bias, activation)
    return y.to(x.dtype), window[:, window.shape[1] - (width - 1) :]


def causal_conv1d_prefill(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    activation: str | None,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.conv.causal_conv1d_prefill`; arguments are checked there."""
    columns = weight.shape[1] - 1
    rows = zip(query_start.tolist(), query_end.tolist(), state_slots.tolist(), has_initial_state.tolist(), strict=True)
    for row, (start, end, slot, has_history) in enumerate(rows):
        if end <= start or slot < 0:
            continue
        inputs = x[None, start:end].to(_compute_dtype(x))
        history = conv_state[slot, :, :columns].T[None].to(inputs.dtype) if has_history else None
        y, new_history = causal_conv(inputs, weight, history, bias, activation)
        out[start:end] = y[0].to(out.dtype)
        if snapshot is not None:
            taken, target = (int(vector[row]) for vector in snapshot)
            if target >= 0 and 0 < taken <= end - start:
                _, window = causal_conv(inputs[:, :taken], weight, history, bias, activation)
                conv_state[target, :, :columns] = window[0].T.to(conv_state.dtype)
        conv_state[slot, :, :columns] = new_history[0].T.to(conv_state.dtype)


def causal_conv1d_update(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    num_accepted_tokens: Tensor | None,
    max_query_len: int,
    out: Tensor,
    activation: str | None,
    snapshot_slots: Tensor | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.conv.causal_conv1d_update`; arguments are checked there.

    Rows of one length are computed together, so an ordinary decode batch is one vectorised step.
    """
    columns = weight.shape[1] - 1
    lengths = torch.where(state_slots >= 0, query_end - query_start, 0).clamp(max=max_query_len)
    for length in range(1, max_query_len + 1):
        rows = (lengths == length).nonzero()  # [R, 1]: broadcasts against columns and tokens
        if rows.numel() == 0:
            continue
        slots = state_slots.long()[rows]
        tokens = query_start[rows] + torch.arange(length, device=x.device)
        first = 0 if num_accepted_tokens is None else num_accepted_tokens[rows] - 1
        history = conv_state[slots, :, first + torch.arange(columns, device=x.device)]
        window = torch.cat([history.to(_compute_dtype(x)), x[tokens].to(_compute_dtype(x))], dim=1)
        out[tokens] = convolve(window, weight, bias, activation).to(out.dtype)
        if snapshot_slots is not None:
            targets = snapshot_slots[rows.squeeze(1)].long()
            taken = targets >= 0
            conv_state[targets[taken], :, :columns] = window[taken, length:].mT.to(conv_state.dtype)
        kept = torch.arange(columns - 1 + length, device=x.device)
        conv_state[slots, :, kept] = window[:, 1:].to(conv_state.dtype)
