"""Verification of drafts that moves no state, and the commit of what was accepted.

Keeping the state after every draft costs a write of a whole state a token, and a read and a write more for the accepted
one. Here the verification reads the state, and leaves :class:`.records.DraftRecords`; the commit reads the state,
applies the accepted tokens' rank-one updates, and writes it.
"""

from torch import Tensor

from ..dispatch import TRITON, Choice, choose, declare
from . import reference_drafts as reference
from .choices import verify_choices
from .records import DraftRecords
from .validation import check_commit, check_fused, check_record, check_tokens, check_verify_rows

declare("gdn_verify_fused", cuda=verify_choices)
declare("gdn_commit", cuda=(Choice("after such drafts", why="all layers in one launch"),))


def gdn_verify_fused(
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
    record: DraftRecords,
    *,
    num_k_heads: int,
    norm_eps: float,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    out: Tensor,
    backend: str | None = None,
) -> None:
    """A few tokens a row (the last accepted one and its drafts) through a layer but its projections; states stay.

    The convolution, the gated delta rule and the gated norm as in :func:`.gdn_decode_fused`. Token j of row n leaves
    in ``record[n, j]`` what :func:`gdn_commit` applies. Between the tokens of a row nothing is rounded to the state's
    dtype, as it is between the steps of a decode. Of one ``max_query_len``, what a token leaves hangs on the tokens
    before it alone, to the bit. Tokens verified at once equal the same ones verified and committed one by one to about
    1e-5, float32 sums in another order. The output is written whole: a token in no row gets zeros.

    Args:
        mixed_qkv, z, a, b, conv_weight, A_log, dt_bias, norm_weight, norm_eps, conv_state, ssm_state, out, backend: as
            for :func:`.gdn_decode_fused`, but both states are only read.
        record: of one layer, contiguous, with room for R rows of M tokens.
        query_start, query_end: ``[N]`` integers; no two rows share a token. Empty rows are skipped.
        max_query_len: at most M; of a longer row the first so many tokens are taken. It may be a host constant of a
            captured graph.
        state_slots: ``[N]`` integers, any stride; a row with a negative one is skipped, and so is row n >= R.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, or ``max_query_len`` exceeds M.
    """
    check_tokens(mixed_qkv, a, b, A_log, dt_bias, ssm_state, num_k_heads, out)
    check_fused(mixed_qkv, z, conv_weight, norm_weight, conv_state, out)
    check_record(record, ssm_state[None], num_k_heads, layers=())
    rows = check_verify_rows(mixed_qkv, query_start, query_end, max_query_len, state_slots=state_slots)
    room = record.inputs.shape[1]
    if max_query_len > room:
        raise ValueError(f"max_query_len is {max_query_len}, but record has room for {room} tokens a row")
    chosen = choose(mixed_qkv, backend)
    if rows == 0 or mixed_qkv.shape[0] == 0 or max_query_len == 0:
        out.zero_()
        return
    if chosen == TRITON:
        from . import triton_verify

        run = triton_verify.gdn_verify_fused
    else:
        run = reference.gdn_verify_fused
    run(
        mixed_qkv,
        z,
        (a, b, A_log, dt_bias),
        conv_weight,
        norm_weight,
        norm_eps,
        conv_state,
        ssm_state,
        record,
        num_k_heads,
        query_start,
        query_end,
        max_query_len,
        state_slots,
        out,
    )


def gdn_commit(
    conv_state: Tensor,
    ssm_state: Tensor,
    records: DraftRecords,
    *,
    state_slots: Tensor,
    last_tokens: Tensor,
    snapshot_slots: Tensor | None = None,
    snapshot_tokens: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """Move both states of every row and layer past the row's accepted tokens, in place, in one launch.

    Args:
        conv_state: ``[layers, S, conv_dim, W - 1]``, any strides; afterwards the last W - 1 inputs.
        ssm_state: ``[layers, S, HV, V, K]``, any strides.
        records: of all layers, as the last verification left them: row n of it is row n here.
        state_slots: ``[N]`` integers, any stride; a row with a negative one is skipped, and so is row n >= R. No two
            rows share a slot.
        last_tokens: ``[N]`` integers: the row's last accepted token, counted from 0. A row with a negative one is
            skipped; a row that had no tokens in that verification must have one, since its record is another's.
        snapshot_slots, snapshot_tokens: ``[N]`` integers, both or neither: both states as they are after that token go
            to that slot too, where neither is negative and the token is not behind the last accepted one. No row may
            read or write a slot given here.
        backend: None (Triton on CUDA, else the reference), ``"reference"`` or ``"triton"``.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    rows = check_commit(conv_state, ssm_state, records, state_slots, last_tokens, snapshot_slots, snapshot_tokens)
    snapshot = None
    if snapshot_slots is not None and snapshot_tokens is not None:
        snapshot = (snapshot_slots, snapshot_tokens)
    chosen = choose(ssm_state, backend)
    if rows == 0 or ssm_state.shape[0] == 0:
        return
    if chosen == TRITON:
        from . import triton_commit

        run = triton_commit.gdn_commit
    else:
        run = reference.gdn_commit
    run(conv_state, ssm_state, records, state_slots, last_tokens, snapshot)
