"""What the gated delta rule's operations ask of their arguments."""

import torch
from torch import Tensor

from ..checks import FLOATS, INTS, check, check_dims, check_optional, check_rows
from ..conv.validation import MAX_WIDTH, check_conv
from .packed import PackedRows
from .records import DraftRecords

MAX_HEAD_DIM = 256


def check_tokens(
    mixed_qkv: Tensor,
    a: Tensor,
    b: Tensor,
    A_log: Tensor,
    dt_bias: Tensor,
    ssm_state: Tensor,
    num_k_heads: int,
    out: Tensor,
) -> None:
    """Raise ValueError, with the shapes, unless tokens, gates and state fit together."""
    check_dims("mixed_qkv", mixed_qkv, "[tokens, 2 * key_dim + value_dim]", 2)
    check_dims("ssm_state", ssm_state, "[slots, v_heads, head_v_dim, head_k_dim]", 4)
    tokens, conv_dim = mixed_qkv.shape
    slots, v_heads, value_dim, key_dim = ssm_state.shape
    if num_k_heads < 1 or v_heads % num_k_heads:
        raise ValueError(
            f"num_k_heads is {num_k_heads}, but ssm_state of shape {tuple(ssm_state.shape)} has {v_heads} value heads; "
            "these must be a multiple of the key heads"
        )
    if not (1 <= key_dim <= MAX_HEAD_DIM and 1 <= value_dim <= MAX_HEAD_DIM):
        raise ValueError(f"ssm_state has shape {tuple(ssm_state.shape)}: head dims must lie in 1..{MAX_HEAD_DIM}")
    wanted = 2 * num_k_heads * key_dim + v_heads * value_dim
    if conv_dim != wanted:
        raise ValueError(
            f"mixed_qkv has shape {tuple(mixed_qkv.shape)}, but {num_k_heads} key heads and ssm_state of shape "
            f"{tuple(ssm_state.shape)} need {wanted} columns (q | k | v)"
        )
    check("mixed_qkv", mixed_qkv, (tokens, conv_dim), FLOATS, mixed_qkv)
    check("a", a, (tokens, v_heads), FLOATS, mixed_qkv)
    check("b", b, (tokens, v_heads), FLOATS, mixed_qkv)
    check("A_log", A_log, (v_heads,), FLOATS, mixed_qkv)
    check("dt_bias", dt_bias, (v_heads,), FLOATS, mixed_qkv)
    check("ssm_state", ssm_state, (slots, v_heads, value_dim, key_dim), FLOATS, mixed_qkv)
    check("out", out, (tokens, v_heads, value_dim), FLOATS, mixed_qkv)


def check_fused(
    mixed_qkv: Tensor, z: Tensor, conv_weight: Tensor, norm_weight: Tensor, conv_state: Tensor, out: Tensor
) -> None:
    """Check what a decode step needs besides :func:`check_tokens`, where ``out [T, HV, V]`` is checked."""
    check_conv(mixed_qkv, conv_weight, None, conv_state, mixed_qkv, "silu")
    check("z", z, tuple(out.shape), FLOATS, mixed_qkv)
    check("norm_weight", norm_weight, (out.shape[2],), FLOATS, mixed_qkv)


def check_prefill_rows(
    mixed_qkv: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    has_initial_state: Tensor,
) -> int:
    """Check the rows of a prefill and return their number."""
    _check_length(max_query_len)
    return check_rows(
        query_start,
        query_end,
        mixed_qkv,
        state_slots=(state_slots, INTS),
        has_initial_state=(has_initial_state, (torch.bool,)),
    )


def check_packed(packed: PackedRows, rows: int, mixed_qkv: Tensor) -> None:
    """Check what the host knows of a prefill's rows against the rows and the batch."""
    if len(packed.lengths) != rows:
        raise ValueError(f"packed has {len(packed.lengths)} lengths, but query_start names {rows} rows; give one each")
    last, tokens = packed.first + packed.tokens, mixed_qkv.shape[0]
    if packed.first < 0 or last > tokens:
        raise ValueError(f"packed covers tokens {packed.first} to {last}, but the batch has {tokens}")
    check("packed.cu_seqlens", packed.cu_seqlens, (rows + 1,), (torch.int64,), mixed_qkv)


def check_decode_rows(mixed_qkv: Tensor, query_start: Tensor, query_end: Tensor, state_slots: Tensor) -> int:
    """Check the rows of a decode step and return their number."""
    return check_rows(query_start, query_end, mixed_qkv, state_slots=(state_slots, INTS))


def check_verify_rows(
    mixed_qkv: Tensor, query_start: Tensor, query_end: Tensor, max_query_len: int, **slots: Tensor
) -> int:
    """Check the rows of a verification, each with a slot of that name, and return their number."""
    _check_length(max_query_len)
    return check_rows(query_start, query_end, mixed_qkv, **{name: (slot, INTS) for name, slot in slots.items()})


def check_output_slots(mixed_qkv: Tensor, rows: int, max_query_len: int, output_slots: Tensor) -> None:
    """Check where a verification leaves the state after each token."""
    check_dims("output_slots", output_slots, "[rows, tokens a row]", 2)
    columns = output_slots.shape[1]
    check("output_slots", output_slots, (rows, columns), INTS, mixed_qkv)
    if max_query_len > columns:
        raise ValueError(
            f"max_query_len is {max_query_len}, but output_slots of shape {tuple(output_slots.shape)} names slots for "
            f"{columns} tokens a row"
        )


def check_record(record: DraftRecords, ssm_state: Tensor, num_k_heads: int, layers: tuple[int, ...]) -> None:
    """Check what drafts are recorded in against ``ssm_state [layers, S, HV, V, K]``; layers are its own, or none."""
    _, _, v_heads, value_dim, key_dim = ssm_state.shape
    check_dims("record.inputs", record.inputs, "[rows, tokens a row, conv_dim]", 3 + len(layers))
    room = (*layers, *record.inputs.shape[len(layers) : -1])
    conv_dim = 2 * num_k_heads * key_dim + v_heads * value_dim
    check("record.inputs", record.inputs, (*room, conv_dim), FLOATS, ssm_state)
    wide = {"keys": (num_k_heads, key_dim), "writes": (v_heads, value_dim), "decays": (v_heads,)}
    for name, shape in wide.items():
        check(f"record.{name}", getattr(record, name), (*room, *shape), (torch.float32,), ssm_state)
    for tensor in record.tensors():
        if not tensor.is_contiguous():
            raise ValueError(f"record has a tensor of strides {tensor.stride()}; contiguous ones are needed")


def check_commit(
    conv_state: Tensor,
    ssm_state: Tensor,
    records: DraftRecords,
    state_slots: Tensor,
    last_tokens: Tensor,
    snapshot_slots: Tensor | None,
    snapshot_tokens: Tensor | None,
) -> int:
    """Check a commit's states, records and rows, and return the number of rows."""
    check_dims("ssm_state", ssm_state, "[layers, slots, v_heads, head_v_dim, head_k_dim]", 5)
    check_dims("conv_state", conv_state, "[layers, slots, conv_dim, width - 1]", 4)
    check_dims("records.keys", records.keys, "[layers, rows, tokens a row, k_heads, head_k_dim]", 5)
    layers, _, v_heads, _, _ = ssm_state.shape
    k_heads = records.keys.shape[3]
    if k_heads < 1 or v_heads % k_heads:
        raise ValueError(
            f"records.keys has shape {tuple(records.keys.shape)}, {k_heads} key heads, but the {v_heads} value heads "
            "of ssm_state must be a multiple of them"
        )
    check("ssm_state", ssm_state, tuple(ssm_state.shape), FLOATS, ssm_state)
    check_record(records, ssm_state, k_heads, layers=(layers,))
    shape = (layers, conv_state.shape[1], records.inputs.shape[3], conv_state.shape[3])
    check("conv_state", conv_state, shape, FLOATS, ssm_state)
    if not 1 <= conv_state.shape[3] < MAX_WIDTH:
        raise ValueError(f"conv_state has shape {tuple(conv_state.shape)}: windows hold 1 to {MAX_WIDTH - 1} inputs")
    check_dims("state_slots", state_slots, "[rows]", 1)
    rows = state_slots.shape[0]
    check("state_slots", state_slots, (rows,), INTS, ssm_state)
    check_optional(rows, ssm_state, last_tokens=last_tokens)
    check_optional(rows, ssm_state, snapshot_slots=snapshot_slots, snapshot_tokens=snapshot_tokens)
    return rows


def _check_length(max_query_len: int) -> None:
    if max_query_len < 0:
        raise ValueError(f"max_query_len is {max_query_len}; it must be 0 or more")
