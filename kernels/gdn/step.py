"""One Gated DeltaNet step over a mixed batch: which rows run chunked, which run token by token.

Engines describe a step with up to three row sets. Rows are token ranges of the flat batch, so prefill, decode and
verify rows may lie in any order and no token is gathered or copied. A step of which every row decodes is one launch,
and so is one of drafts that the engine commits afterwards, or of many rows of drafts that leave a state each.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..conv import causal_conv1d_update
from ..norm import rms_norm_gated
from . import (
    Convolution,
    DraftRecords,
    PackedRows,
    gdn_decode,
    gdn_decode_fused,
    gdn_prefill,
    gdn_verify,
    gdn_verify_fused,
    gdn_verify_states,
)
from .states import runs_at_once


@dataclass(frozen=True)
class PrefillRows:
    """Rows that continue a prompt: chunked form, final state written back to the row's slot.

    query_start, query_end, state_slots: int32 [N]; has_initial_state: bool [N]; max_query_len: bound on the lengths.
    snapshot_positions, snapshot_slots: int [N] or None, where both states are kept besides, after how many tokens.
    packed: the same rows as the host knows them, if they lie one behind the other in order; else None.
    """

    query_start: torch.Tensor
    query_end: torch.Tensor
    state_slots: torch.Tensor
    has_initial_state: torch.Tensor
    max_query_len: int
    snapshot_positions: torch.Tensor | None = None
    snapshot_slots: torch.Tensor | None = None
    packed: PackedRows | None = None


@dataclass(frozen=True)
class RecurrentRows:
    """Rows that decode one token or verify several draft tokens, each state going to a slot of its own.

    query_start, query_end, conv_slots, initial_slots: int32 [N]; output_slots: int32 [N, M], column j takes the state
    after token j; num_accepted_tokens: int32 [N], how many tokens of the previous step were kept, which is where the
    convolution's window starts, or None for rows that decode one token: they have one slot each, in all three;
    max_query_len: host bound on the lengths (at most M).
    snapshot_slots: int [N] or None, where both states are kept besides; of rows that decode only.
    """

    query_start: torch.Tensor
    query_end: torch.Tensor
    conv_slots: torch.Tensor
    initial_slots: torch.Tensor
    output_slots: torch.Tensor
    num_accepted_tokens: torch.Tensor | None
    max_query_len: int
    snapshot_slots: torch.Tensor | None = None


@dataclass(frozen=True)
class DraftRows:
    """Rows that verify draft tokens and leave their slots alone until the engine commits what it accepted.

    query_start, query_end, state_slots: int32 [N]; max_query_len: host bound on the lengths. They come alone: an engine
    that keeps a place for row n of a step verifies in steps of its own.
    """

    query_start: torch.Tensor
    query_end: torch.Tensor
    state_slots: torch.Tensor
    max_query_len: int


@dataclass(frozen=True)
class GdnParameters:
    """Constants of a layer (this rank's): conv_weight [conv_dim, W], A_log and dt_bias [num_v_heads] fp32, norm_weight
    [head_v_dim] and norm_eps of the gated norm.
    """

    conv_weight: torch.Tensor
    A_log: torch.Tensor
    dt_bias: torch.Tensor
    norm_weight: torch.Tensor
    norm_eps: float
    num_k_heads: int


def gdn_step(
    qkvz: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    params: GdnParameters,
    conv_state: torch.Tensor,
    ssm_state: torch.Tensor,
    out: torch.Tensor,
    *,
    prefill: PrefillRows | None = None,
    recurrent: RecurrentRows | None = None,
    drafts: tuple[DraftRows, DraftRecords] | None = None,
) -> None:
    """Convolution, delta rule and gated norm of every row of a step; states are updated in place, `out` is filled.

    qkvz [T, conv_dim + HV * V] flat, a and b [T, HV], conv_state [S, conv_dim, L], ssm_state [S, HV, V, K], out
    [T, HV, V] contiguous, in the dtype of qkvz. Tokens in no row get zeros (if their z is finite): they are padding,
    but are projected and routed all the same.
    """
    conv_dim = params.conv_weight.shape[0]
    mixed_qkv, z = qkvz[:, :conv_dim], qkvz[:, conv_dim:].unflatten(-1, out.shape[1:])
    whole = (mixed_qkv, z, a, b, params.conv_weight, params.A_log, params.dt_bias, params.norm_weight)
    if drafts is not None:
        if prefill is not None or recurrent is not None:
            raise ValueError("drafts come with other rows; they must be all of a step")
        rows, record = drafts
        gdn_verify_fused(
            *whole,
            conv_state,
            ssm_state,
            record,
            num_k_heads=params.num_k_heads,
            norm_eps=params.norm_eps,
            query_start=rows.query_start,
            query_end=rows.query_end,
            max_query_len=rows.max_query_len,
            state_slots=rows.state_slots,
            out=out,
        )
        return
    alone = recurrent if prefill is None else None
    accepted = None if alone is None else alone.num_accepted_tokens
    if alone is not None and accepted is not None and runs_at_once(ssm_state, len(accepted), alone.max_query_len):
        gdn_verify_states(
            *whole,
            conv_state,
            ssm_state,
            num_k_heads=params.num_k_heads,
            norm_eps=params.norm_eps,
            query_start=alone.query_start,
            query_end=alone.query_end,
            max_query_len=alone.max_query_len,
            conv_slots=alone.conv_slots,
            initial_slots=alone.initial_slots,
            output_slots=alone.output_slots,
            num_accepted_tokens=accepted,
            out=out,
        )
        return
    if alone is not None and accepted is None:
        gdn_decode_fused(
            *whole,
            conv_state,
            ssm_state,
            num_k_heads=params.num_k_heads,
            norm_eps=params.norm_eps,
            query_start=alone.query_start,
            query_end=alone.query_end,
            state_slots=alone.initial_slots,
            out=out,
            snapshot_slots=alone.snapshot_slots,
        )
        return
    out.zero_()
    gates = (a, b, params.A_log, params.dt_bias)
    if prefill is not None:
        gdn_prefill(
            mixed_qkv,
            *gates,
            ssm_state,
            num_k_heads=params.num_k_heads,
            max_query_len=prefill.max_query_len,
            has_initial_state=prefill.has_initial_state,
            out=out,
            query_start=prefill.query_start,
            query_end=prefill.query_end,
            state_slots=prefill.state_slots,
            snapshot_positions=prefill.snapshot_positions,
            snapshot_slots=prefill.snapshot_slots,
            packed=prefill.packed,
            convolution=Convolution(params.conv_weight, conv_state),
        )
    if recurrent is not None:
        convolved = torch.empty(mixed_qkv.shape, dtype=mixed_qkv.dtype, device=mixed_qkv.device)
        causal_conv1d_update(
            mixed_qkv,
            params.conv_weight,
            None,
            conv_state,
            state_slots=recurrent.conv_slots,
            num_accepted_tokens=recurrent.num_accepted_tokens,
            max_query_len=recurrent.max_query_len,
            out=convolved,
            query_start=recurrent.query_start,
            query_end=recurrent.query_end,
            snapshot_slots=recurrent.snapshot_slots,
        )
        if recurrent.num_accepted_tokens is None:
            gdn_decode(
                convolved,
                *gates,
                ssm_state,
                num_k_heads=params.num_k_heads,
                state_slots=recurrent.initial_slots,
                out=out,
                query_start=recurrent.query_start,
                query_end=recurrent.query_end,
                snapshot_slots=recurrent.snapshot_slots,
            )
        else:
            gdn_verify(
                convolved,
                *gates,
                ssm_state,
                num_k_heads=params.num_k_heads,
                max_query_len=recurrent.max_query_len,
                initial_slots=recurrent.initial_slots,
                output_slots=recurrent.output_slots,
                out=out,
                query_start=recurrent.query_start,
                query_end=recurrent.query_end,
            )
    rms_norm_gated(out, z, params.norm_weight, params.norm_eps, out=out)
