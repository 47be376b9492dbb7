"""The gated delta rule in plain torch: recurrent and chunked, differentiable, and reading like the formula.

One head carries a state S [V, K]: S_t = exp(g_t) S_{t-1} (I - beta_t k_t k_t^T) + beta_t v_t k_t^T and o_t = S_t q_t
(Gated Delta Networks, arXiv 2412.06464, section 3.1). The chunked form follows its section 3.3 and the WY
representation with the UT transform of DeltaNet (arXiv 2406.06484, section 3).
"""

import torch
from torch import Tensor
from torch.nn import functional


def _compute_dtype(*tensors: Tensor) -> torch.dtype:
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def l2_normalize(x: Tensor, eps: float = 1e-6) -> Tensor:
    """``x / sqrt(sum(x^2) + eps)`` over the last dimension; arithmetic in float32 or wider, dtype of ``x`` kept."""
    wide = x.to(_compute_dtype(x))
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
    dtype = _compute_dtype(a, b)
    g = -A_log.to(dtype).exp() * functional.softplus(a.to(dtype) + dt_bias.to(dtype))
    return g, torch.sigmoid(b.to(dtype))


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
    dtype = _compute_dtype(q, k, v, g, beta)
    batch, length, heads, value_dim = v.shape
    q, k, wide_v, g, beta = (t.to(dtype) for t in (q, k, v, g, beta))
    q = q * k.shape[-1] ** -0.5
    if initial_state is None:
        state = wide_v.new_zeros(batch, heads, value_dim, k.shape[-1])
    else:
        state = initial_state.to(dtype)
    decay = g.exp()
    outputs = []
    for t in range(length):
        state = state * decay[:, t, :, None, None]
        recalled = (state @ k[:, t, :, :, None]).squeeze(-1)
        written = beta[:, t, :, None] * (wide_v[:, t] - recalled)
        state = state + written[..., None] * k[:, t, :, None, :]
        outputs.append((state @ q[:, t, :, :, None]).squeeze(-1))
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
    dtype = _compute_dtype(q, k, v, g, beta)
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
