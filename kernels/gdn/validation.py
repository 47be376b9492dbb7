"""What the gated delta rule's operations ask of their arguments."""

import torch
from torch import Tensor

from ..checks import FLOATS, INTS, check, check_dims, check_rows
from ..conv.validation import check_conv

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


def check_decode_rows(mixed_qkv: Tensor, query_start: Tensor, query_end: Tensor, state_slots: Tensor) -> int:
    """Check the rows of a decode step and return their number."""
    return check_rows(query_start, query_end, mixed_qkv, state_slots=(state_slots, INTS))


def check_verify_rows(
    mixed_qkv: Tensor,
    ssm_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    initial_slots: Tensor,
    output_slots: Tensor,
    output_state: Tensor,
) -> int:
    """Check the rows of a verification and return their number."""
    _check_length(max_query_len)
    rows = check_rows(query_start, query_end, mixed_qkv, initial_slots=(initial_slots, INTS))
    check_dims("output_slots", output_slots, "[rows, tokens a row]", 2)
    columns = output_slots.shape[1]
    check("output_slots", output_slots, (rows, columns), INTS, mixed_qkv)
    if max_query_len > columns:
        raise ValueError(
            f"max_query_len is {max_query_len}, but output_slots of shape {tuple(output_slots.shape)} names slots for "
            f"{columns} tokens a row"
        )
    check("output_state", output_state, (output_state.shape[0], *ssm_state.shape[1:]), FLOATS, mixed_qkv)
    return rows


def _check_length(max_query_len: int) -> None:
    if max_query_len < 0:
        raise ValueError(f"max_query_len is {max_query_len}; it must be 0 or more")
