"""Convolution, gates and delta rule of SGLang's own Qwen3-Next, for the tests that serve it (the kill switch).

The plugin's model has kernels of its own and calls none of these. The formulas are ``qwen3next_plugin.kernels``'; here
is what SGLang wraps around them: slots, windows and states kept for a rollback.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from qwen3next_plugin.kernels.conv.reference import causal_conv
from qwen3next_plugin.kernels.gdn.reference import delta_rule_recurrent, gdn_gates, l2_normalize

CHUNK = 64
"""Tokens between the states that a prefill hands back (FLA's chunk size)."""

_Keep = Callable[[int, Tensor], None]


def fused_gdn_gating_cpu(A_log: Tensor, a: Tensor, b: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """Log decay and write strength ``[1, T, HV]`` in float32 from a, b ``[T, HV]``."""
    g, beta = gdn_gates(a, b, A_log, dt_bias)
    return g.unsqueeze(0), beta.unsqueeze(0)


def _convolve(
    x: Tensor, history: Tensor | None, weight: Tensor, bias: Tensor | None, activation: str | None
) -> tuple[Tensor, Tensor]:
    """x ``[D, T]`` after its history ``[D, W - 1]``: y ``[D, T]`` and history and x in one, ``[D, W - 1 + T]``."""
    before = x.new_zeros(x.shape[0], weight.shape[-1] - 1) if history is None else history.to(x.dtype)
    y, _ = causal_conv(x.T[None], weight, before.T[None], bias, activation if activation == "silu" else None)
    return y[0].T, torch.cat([before, x], dim=-1)


def causal_conv1d_fn_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_states: Tensor,
    has_initial_state: Tensor,
    cache_indices: Tensor,
    query_start_loc: Tensor,
    seq_lens_cpu: object = None,
    **unused: object,
) -> Tensor:
    """Prefill of the sequences in x ``[D, T]``: y like x; each slot then holds the last W - 1 inputs.

    Rows without tokens or with a slot below zero are skipped, and their output is zero.
    """
    out, columns = torch.zeros_like(x), weight.shape[-1] - 1
    bounds = query_start_loc.tolist()
    for row, slot in enumerate(cache_indices.tolist()):
        first, last = bounds[row], bounds[row + 1]
        if slot < 0 or last <= first:
            continue
        history = conv_states[slot, :, -columns:] if bool(has_initial_state[row]) else None
        out[:, first:last], window = _convolve(x[:, first:last], history, weight, bias, activation)
        conv_states[slot] = window[:, -columns:].to(conv_states.dtype)
    return out


def causal_conv1d_update_cpu(
    x: Tensor,
    conv_states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    conv_state_indices: Tensor,
    intermediate_conv_window: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    retrieve_next_token: Tensor | None = None,
    retrieve_next_sibling: Tensor | None = None,
    retrieve_parent_token: Tensor | None = None,
) -> Tensor:
    """Decode (x ``[N, D]``) or verify (x ``[N, D, T]``): y like x.

    Decode moves the slot on. Verify leaves the slot alone and keeps the window after each token in
    ``intermediate_conv_window[row, token]``, from which the accepted one is copied later.
    """
    if retrieve_parent_token is not None:
        raise NotImplementedError("causal_conv1d_update_cpu: draft trees have no stand-in, only chains (top-k 1)")
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    out, columns = torch.zeros_like(tokens), weight.shape[-1] - 1
    for row, slot in enumerate(conv_state_indices.tolist()):
        if slot < 0:
            continue
        out[row], window = _convolve(tokens[row], conv_states[slot], weight, bias, activation)
        if intermediate_conv_window is None:
            conv_states[slot] = window[:, -columns:].to(conv_states.dtype)
        else:
            assert intermediate_state_indices is not None
            kept = intermediate_conv_window[int(intermediate_state_indices[row])]
            for t in range(tokens.shape[-1]):
                kept[t] = window[:, t + 1 : t + 1 + columns].to(kept.dtype)
    return out.squeeze(-1) if x.dim() == 2 else out


def _run(
    tokens: tuple[Tensor, ...], state: Tensor, normalize: bool, step: int, keep: _Keep | None
) -> tuple[Tensor, Tensor]:
    """One sequence from ``state [HV, V, K]``: output like v, state in float32.

    ``tokens`` are q, k ``[T, H, K]``, v ``[T, HV, V]``, g and beta ``[T, HV]``. ``keep(tokens, state)`` is called
    before the first token, after every ``step`` tokens and after the last.
    """
    q, k, v, g, beta = tokens
    q, k = q.float(), k.float()
    if normalize:
        q, k = l2_normalize(q), l2_normalize(k)
    group = v.shape[1] // q.shape[1]
    q, k = (t.repeat_interleave(group, dim=1) for t in (q, k))
    out, state = torch.empty_like(v), state.float()
    for first in range(0, v.shape[0], step):
        piece = slice(first, first + step)
        if keep is not None:
            keep(first, state)
        own = (q[None, piece], k[None, piece], v[None, piece], g[None, piece], beta[None, piece])
        o, states = delta_rule_recurrent(*own, initial_state=state[None])
        out[piece], state = o[0], states[0]
    if keep is not None:
        keep(v.shape[0], state)
    return out, state


def chunk_gated_delta_rule_cpu(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor,
    cu_seqlens: Tensor,
    head_first: bool,
    use_qk_l2norm_in_kernel: bool,
    initial_state_indices: Tensor,
    **unused: object,
) -> tuple[Tensor, None, Tensor | None]:
    """Prefill: q, k ``[1, T, H, K]``, v ``[1, T, HV, V]``; the states of ``initial_state_indices`` move on in place.

    Returns the output like v, None, and the state before every 64th token of every sequence ``[1, chunks, HV, V, K]``.
    """
    assert not head_first
    out, bounds, kept = torch.zeros_like(v), cu_seqlens.tolist(), []
    for row, slot in enumerate(initial_state_indices.tolist()):
        first, last = bounds[row], bounds[row + 1]
        if last <= first:
            continue
        length = last - first

        def keep(tokens: int, state: Tensor, length: int = length) -> None:
            if tokens < length:
                kept.append(state.clone())

        # A padded row has slot -1: it takes part in the list of chunks, and no state is its own.
        state = torch.zeros_like(initial_state[0]) if slot < 0 else initial_state[slot]
        tokens = tuple(t[0, first:last] for t in (q, k, v, g, beta))
        out[0, first:last], state = _run(tokens, state, use_qk_l2norm_in_kernel, CHUNK, keep)
        if slot >= 0:
            initial_state[slot] = state.to(initial_state.dtype)
    return out, None, torch.stack(kept).unsqueeze(0) if kept else None


def fused_sigmoid_gating_delta_rule_update_cpu(
    A_log: Tensor,
    dt_bias: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    a: Tensor,
    b: Tensor,
    initial_state_source: Tensor,
    initial_state_indices: Tensor,
    cu_seqlens: Tensor,
    use_qk_l2norm_in_kernel: bool = True,
    softplus_beta: float = 1.0,
    softplus_threshold: float = 20.0,
    is_kda: bool = False,
    disable_state_update: bool = False,
    intermediate_states_buffer: Tensor | None = None,
    intermediate_state_indices: Tensor | None = None,
    cache_steps: int | None = None,
    retrieve_parent_token: Tensor | None = None,
) -> Tensor:
    """Decode and verify: shapes as for the prefill, a and b ``[T, HV]``.

    The state after token t goes to ``intermediate_states_buffer[row, t]`` if there is one, the last one to its slot
    unless ``disable_state_update``.
    """
    if retrieve_parent_token is not None or is_kda or (softplus_beta, softplus_threshold) != (1.0, 20.0):
        raise NotImplementedError(
            "fused_sigmoid_gating_delta_rule_update_cpu: only what Qwen3-Next needs has a stand-in"
        )
    g, beta = gdn_gates(a, b, A_log, dt_bias)
    out, bounds = torch.zeros_like(v), cu_seqlens.tolist()
    for row, slot in enumerate(initial_state_indices.tolist()[: len(bounds) - 1]):
        first, last = bounds[row], bounds[row + 1]
        if slot < 0 or last <= first:
            continue
        keep: _Keep | None = None
        if intermediate_states_buffer is not None:
            assert intermediate_state_indices is not None
            states = intermediate_states_buffer[int(intermediate_state_indices[row])]

            def keep(tokens: int, state: Tensor, states: Tensor = states) -> None:
                if tokens > 0:
                    states[tokens - 1] = state.to(states.dtype)

        tokens = (*(t[0, first:last] for t in (q, k, v)), g[first:last], beta[first:last])
        initial = initial_state_source[slot]
        out[0, first:last], state = _run(tokens, initial, use_qk_l2norm_in_kernel, 1, keep)
        if not disable_state_update:
            initial_state_source[slot] = state.to(initial_state_source.dtype)
    return out
