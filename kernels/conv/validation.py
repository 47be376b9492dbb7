"""What the convolution's operations ask of their arguments."""

import torch
from torch import Tensor

from ..checks import FLOATS, INTS, check, check_dims, check_rows

MAX_WIDTH = 8


def check_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, conv_state: Tensor, out: Tensor, activation: str | None
) -> None:
    """Raise ValueError, with the shapes, unless tokens, weight and state fit together."""
    check_dims("x", x, "[tokens, conv_dim]", 2)
    check_dims("weight", weight, "[conv_dim, width]", 2)
    check_dims("conv_state", conv_state, "[slots, conv_dim, length]", 3)
    tokens, dim = x.shape
    width = weight.shape[1]
    check("x", x, (tokens, dim), FLOATS, x)
    check("weight", weight, (dim, width), FLOATS, x)
    if not 2 <= width <= MAX_WIDTH:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: width {width} is outside 2..{MAX_WIDTH}")
    if bias is not None:
        check("bias", bias, (dim,), FLOATS, x)
    check("conv_state", conv_state, (conv_state.shape[0], dim, conv_state.shape[2]), FLOATS, x)
    if conv_state.shape[2] < width - 1:
        raise ValueError(
            f"conv_state has shape {tuple(conv_state.shape)}: width {width} needs at least {width - 1} columns"
        )
    check("out", out, (tokens, dim), (x.dtype,), x)
    if activation not in ("silu", None):
        raise ValueError(f"activation is {activation!r}; it must be 'silu' or None")


def check_prefill_rows(
    x: Tensor, query_start: Tensor, query_end: Tensor, state_slots: Tensor, has_initial_state: Tensor
) -> int:
    """Check the rows of a prefill and return their number."""
    return check_rows(
        query_start,
        query_end,
        x,
        state_slots=(state_slots, INTS),
        has_initial_state=(has_initial_state, (torch.bool,)),
    )


def check_update_rows(
    x: Tensor,
    weight: Tensor,
    conv_state: Tensor,
    query_start: Tensor,
    query_end: Tensor,
    state_slots: Tensor,
    num_accepted_tokens: Tensor | None,
    max_query_len: int,
) -> int:
    """Check the rows of an update, and that ``max_query_len`` new inputs fit into the state; return their number."""
    accepted = {} if num_accepted_tokens is None else {"num_accepted_tokens": (num_accepted_tokens, INTS)}
    rows = check_rows(query_start, query_end, x, state_slots=(state_slots, INTS), **accepted)
    room = conv_state.shape[2] - (weight.shape[1] - 2)
    if not 0 <= max_query_len <= room:
        raise ValueError(
            f"max_query_len is {max_query_len}, but conv_state of shape {tuple(conv_state.shape)} takes 0 to {room} "
            f"new inputs a row at width {weight.shape[1]}"
        )
    return rows
