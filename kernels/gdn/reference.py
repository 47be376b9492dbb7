"""The gated delta rule in plain torch: recurrent and chunked, differentiable, and reading like the formula.

One head carries a state S [V, K]: S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and o_t = S_t q_t
(Gated Delta Networks, arXiv 2412.06464, section 3.1). The chunked form follows its section 3.3 and the WY
representation with the UT transform of DeltaNet (arXiv 2406.06484, section 3).
"""

import torch
from torch import Tensor
from torch.nn import functional

from ..conv.reference import causal_conv1d_update
from ..norm.reference import rms_norm_gated

SNAPSHOT_GRID = 64
"""A prefill keeps snapshots after a multiple of this many tokens of a row (or after its last)."""

Gates = tuple[Tensor, Tensor, Tensor, Tensor]
"""a ``[T, HV]``, b ``[T, HV]``, A_log ``[HV]``, dt_bias ``[HV]``."""


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def as_stored(state: Tensor, dtype: torch.dtype) -> Tensor:
    """The state in the type it is kept in; what float16 cannot hold stops at its largest value, NaN stays NaN."""
    if dtype is torch.float16:
        largest = torch.finfo(dtype).max
        state = state.clamp(-largest, largest)
    return state.to(dtype)


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last dimension; arithmetic in float32 or wider, dtype of ``x`` kept."""
    wide = x.to(compute_dtype(x))
    return (wide * torch.rsqrt(wide.square().sum(-1, keepdim=True) + eps)).to(x.dtype)


def gdn_gates(a: Tensor, b: Tensor, A_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """The log decay and the write strength of every token and value head (arXiv 2412.06464, section 3.4).

    Args:
        a, b: ``[..., HV]``, any float dtype.
        A_log, dt_bias: ``[HV]``.

    Returns:
        ``g = -exp(A_log) * softplus(a + dt_bias)`` (never positive) and ``beta = sigmoid(b)``, ``[..., HV]`` in float32
        (float64 for float64 inputs).
    """
    dtype = compute_dtype(a, b)
    g = -A_log.to(dtype).exp() * functional.softplus(a.to(dtype) + dt_bias.to(dtype))
    return g, torch.sigmoid(b.to(dtype))


def step(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token of every row: q, k ``[B, HV, K]``, v ``[B, HV, V]``, g, beta ``[B, HV]``, state ``[B, HV, V, K]``.

    Returns the output, the state after the token, and what was written under its key ``[B, HV, V]``.
    """
    state = state * g.exp()[..., None, None]
    recalled = (state @ k[..., None]).squeeze(-1)
    written = beta[..., None] * (v - recalled)
    state = state + written[..., None] * k[..., None, :]
    return (state @ (q * k.shape[-1] ** -0.5)[..., None]).squeeze(-1), state, written


def delta_rule_recurrent(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, initial_state: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The gated delta rule, token by token: the yardstick of every other form.

    Args:
        q, k: ``[B, T, HV, K]``, L2-normalised and expanded to the value heads; q is scaled by ``K ** -0.5`` here.
        v: ``[B, T, HV, V]``.
        g: log decay ``[B, T, HV]``, at most 0.
        beta: write strength ``[B, T, HV]``.
        initial_state: ``[B, HV, V, K]`` or None for zeros.

    Returns:
        ``o [B, T, HV, V]`` in the dtype of ``v`` and the final state ``[B, HV, V, K]`` in float32 (float64 for float64
        inputs).
    """
    dtype = compute_dtype(q, k, v, g, beta)
    batch, length, heads, value_dim = v.shape
    q, k, wide_v, g, beta = (t.to(dtype) for t in (q, k, v, g, beta))
    if initial_state is None:
        state = wide_v.new_zeros(batch, heads, value_dim, k.shape[-1])
    else:
        state = initial_state.to(dtype)
    outputs = []
    for t in range(length):
        o, state, _ = step(q[:, t], k[:, t], wide_v[:, t], g[:, t], beta[:, t], state)
        outputs.append(o)
    o = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(wide_v)
    return o.to(v.dtype), state


def delta_rule_chunked(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    initial_state: Tensor | None = None,
    chunk_size: int = 64,
) -> tuple[Tensor, Tensor]:
    """The gated delta rule in chunks of ``chunk_size`` tokens: equal to :func:`delta_rule_recurrent`, far faster.

    With G the running sum of g within a chunk, D_ij = exp(G_i - G_j) for i >= j and S the state before the chunk, the
    values really written, U, solve a unit lower triangular system, and everything else is a matrix product::

        (I + strict_lower(diag(beta) (K K^T * D))) U = diag(beta) (V - diag(exp(G)) K S^T)
        O  = diag(exp(G)) Q S^T + lower(Q K^T * D) U
        S' = exp(G_last) S + U^T diag(exp(G_last - G)) K

    Only differences G_i - G_j with i >= j are exponentiated, so nothing overflows however strong the decay. Arguments
    and results as for :func:`delta_rule_recurrent`.
    """
    dtype = compute_dtype(q, k, v, g, beta)
    batch, length, heads, value_dim = v.shape
    key_dim = k.shape[-1]
    if initial_state is None:
        state = torch.zeros(batch, heads, value_dim, key_dim, dtype=dtype, device=v.device)
    else:
        state = initial_state.to(dtype)
    if length == 0:
        return torch.zeros_like(v), state
    size = min(chunk_size, length)
    chunks = -(-length // size)
    padding = chunks * size - length

    def split(t: Tensor) -> Tensor:
        # Padded tokens have g = 0 and beta = 0: they neither decay nor write the state.
        t = functional.pad(t.to(dtype).movedim(1, 2), (0, 0, 0, padding))
        return t.reshape(batch, heads, chunks, size, t.shape[-1])

    q, k, wide_v = split(q * key_dim**-0.5), split(k), split(v)
    g, beta = split(g[..., None]).squeeze(-1), split(beta[..., None])
    total = g.cumsum(-1)
    above = torch.ones(size, size, dtype=torch.bool, device=v.device).triu(1)
    decay = (total[..., :, None] - total[..., None, :]).masked_fill(above, float("-inf")).exp()
    decay_in = total.exp()[..., None]
    decay_out = (total[..., -1:] - total).exp()[..., None]

    system = beta * (k @ k.transpose(-1, -2)) * decay  # the solve reads only what lies strictly below the diagonal
    right = torch.cat([beta * wide_v, beta * decay_in * k], dim=-1)
    solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
    fresh, replaced = solved.split([value_dim, key_dim], dim=-1)
    inside = (q @ k.transpose(-1, -2)) * decay
    from_state, into_state = q * decay_in, k * decay_out
    carried = decay_in[..., -1:, :]
    outputs = []
    for c in range(chunks):
        written = fresh[:, :, c] - replaced[:, :, c] @ state.transpose(-1, -2)
        outputs.append(from_state[:, :, c] @ state.transpose(-1, -2) + inside[:, :, c] @ written)
        state = carried[:, :, c] * state + written.transpose(-1, -2) @ into_state[:, :, c]
    o = torch.cat(outputs, dim=2)[:, :, :length].movedim(2, 1)
    return o.to(v.dtype), state


def split_tokens(
    mixed_qkv: Tensor, gates: Gates, num_k_heads: int, ssm_state: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``mixed_qkv [..., conv_dim]`` and gates -> q, k ``[..., HV, K]`` (normalised), v ``[..., HV, V]``, g, beta."""
    _, v_heads, value_dim, key_dim = ssm_state.shape
    dtype = compute_dtype(mixed_qkv)
    keys = num_k_heads * key_dim
    q, k, v = mixed_qkv.to(dtype).split([keys, keys, v_heads * value_dim], dim=-1)
    group = v_heads // num_k_heads
    q, k = (l2_normalize(t.unflatten(-1, (num_k_heads, key_dim))).repeat_interleave(group, dim=-2) for t in (q, k))
    a, b, A_log, dt_bias = gates
    return q, k, v.unflatten(-1, (v_heads, value_dim)), *gdn_gates(a.to(dtype), b.to(dtype), A_log, dt_bias)


def gdn_prefill(
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
    out: Tensor,
    snapshot: tuple[Tensor, Tensor] | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_prefill`; arguments are checked there."""
    a, b, A_log, dt_bias = gates
    rows = zip(query_start.tolist(), query_end.tolist(), state_slots.tolist(), has_initial_state.tolist(), strict=True)
    for row, (start, end, slot, has_state) in enumerate(rows):
        if end <= start or slot < 0:
            continue
        pieces, target = [(start, end)], -1
        if snapshot is not None:
            taken, target = (int(vector[row]) for vector in snapshot)
            if target >= 0 and 0 < taken < end - start and taken % SNAPSHOT_GRID == 0:
                pieces = [(start, start + taken), (start + taken, end)]
            elif taken != end - start:
                target = -1
        state = ssm_state[slot, None] if has_state else None
        for first, last in pieces:
            own_gates = (a[None, first:last], b[None, first:last], A_log, dt_bias)
            tokens = split_tokens(mixed_qkv[None, first:last], own_gates, num_k_heads, ssm_state)
            o, state = delta_rule_chunked(*tokens, initial_state=state)
            out[first:last] = o[0].to(out.dtype)
            if target >= 0 and first == start:
                ssm_state[target] = as_stored(state[0], ssm_state.dtype)
        assert state is not None
        ssm_state[slot] = as_stored(state[0], ssm_state.dtype)


def gdn_recurrent(
    mixed_qkv: Tensor,
    gates: Gates,
    ssm_state: Tensor,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    initial_slots: Tensor,
    output_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None,
) -> None:
    """Decode and verify: see :func:`qwen3next_plugin.kernels.gdn.gdn_verify`; arguments are checked there.

    All rows advance together, one token at a time; the rows still running are those longer than j.
    """
    a, b, A_log, dt_bias = gates
    lengths = torch.where(initial_slots >= 0, query_end - query_start, 0).clamp(max=max_query_len)
    rows = (lengths > 0).nonzero().squeeze(1)
    if rows.numel() == 0:
        return
    state = ssm_state[initial_slots[rows].long()].to(compute_dtype(mixed_qkv))
    for j in range(int(lengths.max())):
        running = lengths[rows] > j
        if not bool(running.all()):
            rows, state = rows[running], state[running]
        at = query_start[rows].long() + j
        tokens = split_tokens(mixed_qkv[at], (a[at], b[at], A_log, dt_bias), num_k_heads, ssm_state)
        o, state, _ = step(*tokens, state)
        out[at] = o.to(out.dtype)
        slots = output_slots[rows, j].long()
        kept = slots >= 0
        if bool(kept.all()):
            ssm_state[slots] = as_stored(state, ssm_state.dtype)
        else:
            ssm_state[slots[kept]] = as_stored(state[kept], ssm_state.dtype)
        if snapshot_slots is not None:
            slots = snapshot_slots[rows].long()
            kept = (slots >= 0) & (lengths[rows] == j + 1)
            ssm_state[slots[kept]] = as_stored(state[kept], ssm_state.dtype)


def gdn_decode_fused(
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
    state_slots: Tensor,
    out: Tensor,
    snapshot_slots: Tensor | None,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_decode_fused`; arguments are checked there."""
    rows = (query_start, query_end)
    wide = mixed_qkv.to(compute_dtype(mixed_qkv))
    convolved, core = torch.empty_like(wide), torch.empty(out.shape, dtype=wide.dtype, device=out.device)
    causal_conv1d_update(
        wide, conv_weight, None, conv_state, *rows, state_slots, None, 1, convolved, "silu", snapshot_slots
    )
    slots = (state_slots, state_slots.unsqueeze(1))
    gdn_recurrent(convolved, gates, ssm_state, num_k_heads, *rows, 1, *slots, core, snapshot_slots)
    tokens = query_start[(state_slots >= 0) & (query_end > query_start)].long()
    out.zero_()
    out[tokens] = rms_norm_gated(core[tokens], z[tokens], norm_weight, norm_eps).to(out.dtype)
