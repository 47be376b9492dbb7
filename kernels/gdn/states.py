"""Verification of drafts in one launch that leaves the state after every token in a slot of its own."""

from torch import Tensor

from ..conv.validation import check_update_rows
from ..dispatch import TRITON, choose, declare
from . import reference_drafts as reference
from .choices import states_choices
from .config import states_tile, table_of
from .validation import check_fused, check_output_slots, check_tokens, check_verify_rows

declare("gdn_verify_states", cuda=states_choices)


def runs_at_once(ssm_state: Tensor, rows: int, max_query_len: int) -> bool:
    """Whether the table has :func:`gdn_verify_states` for so many rows, rather than one operation after another."""
    programs = rows * ssm_state.shape[1]
    return states_tile(table_of(ssm_state.device), ssm_state.element_size(), max_query_len, programs) is not None


def gdn_verify_states(
    mixed_qkv: Tensor,
    z: Tensor,
    a: Tensor,
    b: Tensor,
    conv_weight: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    norm_weight: Tensor,
    conv_state: Tensor,
    ssm_state: Tensor,
    *,
    num_k_heads: int,
    norm_eps: float,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    conv_slots: Tensor,
    initial_slots: Tensor,
    output_slots: Tensor,
    num_accepted_tokens: Tensor,
    out: Tensor,
    backend: str | None = None,
) -> None:
    """A few tokens a row (the last accepted one and its drafts) through a layer but its projections.

    The same as :func:`~qwen3next_plugin.kernels.conv.causal_conv1d_update`, :func:`.gdn_verify` and
    :func:`~qwen3next_plugin.kernels.norm.rms_norm_gated` one after another, without rounding in between. Unlike theirs,
    the output is written whole: a token in no row gets zeros.

    Args:
        mixed_qkv, z, a, b, conv_weight, A_log, dt_bias, norm_weight, norm_eps, out, backend: as for
            :func:`.gdn_decode_fused`.
        conv_state: ``[S, conv_dim, L]`` with ``L >= W - 2 + max_query_len``, any strides; read and left at
            ``conv_slots[n]`` as by :func:`~qwen3next_plugin.kernels.conv.causal_conv1d_update`.
        ssm_state: ``[S, HV, V, K]``, any strides; read at ``initial_slots[n]``, written at ``output_slots[n, j]``.
        query_start, query_end: ``[N]`` integers; no two rows share a token. Empty rows are skipped.
        max_query_len: at most M; of a longer row the first so many tokens are taken. It may be a host constant of a
            captured graph.
        conv_slots, initial_slots: ``[N]`` integers, any strides, negative in the same rows: these are skipped. No two
            rows share a slot. The initial one may be one of the row's own output slots.
        output_slots: ``[N, M]`` integers, any strides: the state after token j goes to slot ``[n, j]``, or nowhere if
            that is negative.
        num_accepted_tokens: ``[N]`` integers from 1 on, of rows that are not skipped.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``max_query_len`` exceeds what there is room for.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    check_fused(mixed_qkv, z, conv_weight, norm_weight, conv_state, out)
    ranges = (query_start, query_end)
    check_update_rows(mixed_qkv, conv_weight, conv_state, *ranges, conv_slots, num_accepted_tokens, max_query_len)
    rows = check_verify_rows(mixed_qkv, *ranges, max_query_len, initial_slots=initial_slots)
    check_output_slots(mixed_qkv, rows, max_query_len, output_slots)
    chosen = choose(mixed_qkv, backend)
    if rows == 0 or mixed_qkv.shape[0] == 0 or max_query_len == 0:
        out.zero_()
        return
    if chosen == TRITON:
        from . import triton_verify

        run = triton_verify.gdn_verify_states
    else:
        run = reference.gdn_verify_states
    run(
        mixed_qkv,
        z,
        (a, b, A_log, dt_bias),
        conv_weight,
        norm_weight,
        norm_eps,
        conv_state,
        ssm_state,
        num_k_heads,
        query_start,
        query_end,
        max_query_len,
        conv_slots,
        initial_slots,
        output_slots,
        num_accepted_tokens,
        out,
    )
