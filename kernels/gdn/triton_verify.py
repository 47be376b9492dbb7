"""A layer's whole verification of drafts in one Triton kernel: convolution, gates, delta rule, gated norm, records.

Two kernels do the same, each the faster one of some shapes: :mod:`.triton_verify_steps` takes the state from token to
token, :mod:`.triton_verify_projected` reads it once for all of them. A third, :mod:`.triton_verify_states`, leaves the
states after all tokens instead of records.
"""

import torch
from torch import Tensor

from ..dispatch import interpreting
from ..integers import cdiv, next_power_of_2
from ..ranges import BLOCK_ROWS
from .config import states_tile, table_of, verify_tile
from .records import DraftRecords
from .reference import Gates
from .table import LEAST_ROWS, PROJECTED, StatesTile
from .triton_projection import LEAST_PLACES
from .triton_verify_projected import gdn_verify_projected_kernel
from .triton_verify_states import gdn_verify_states_kernel
from .triton_verify_steps import gdn_verify_steps_kernel

LINE = 128  # bytes that a multiprocessor moves at once
REGISTERS = 128  # a thread: four programs of four warps share a multiprocessor, and nothing is spilled
UNRULED = StatesTile(32, 4)


def gdn_verify_fused(
    mixed_qkv: Tensor,
    z: Tensor,
    gates: Gates,
    conv_weight: Tensor,
    norm_weight: Tensor,
    norm_eps: float,
    conv_state: Tensor,
    ssm_state: Tensor,
    record: DraftRecords,
    num_k_heads: int,
    query_start: Tensor,
    query_end: Tensor,
    max_query_len: int,
    state_slots: Tensor,
    out: Tensor,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_verify_fused`; arguments are checked there.

    A program goes through a head's state ``BLOCK_V`` rows at a time, which no other row of it depends on, and with each
    through all of the row's tokens, by the table's form; the outputs stay in registers for the norm.
    """
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    programs = max(rows, cdiv(tokens, max_query_len)) * v_heads
    tile = verify_tile(table_of(ssm_state.device), ssm_state.element_size(), max_query_len, programs)
    block_m, kernel, least, options = next_power_of_2(max_query_len), gdn_verify_steps_kernel, 1, {}
    if tile.form == PROJECTED:
        kernel, least, places = gdn_verify_projected_kernel, LEAST_ROWS, max(LEAST_PLACES, block_m)
        options = {"PLACES": places, "LEVELS": places.bit_length() - 1, "UPCAST": interpreting() and not z.is_cuda}
    block_v = max(least, min(tile.rows, next_power_of_2(value_dim)))
    kernel[(programs,)](
        mixed_qkv,
        z,
        a,
        b,
        conv_weight,
        A_log.contiguous(),
        dt_bias.contiguous(),
        norm_weight.contiguous(),
        conv_state,
        ssm_state,
        *record.tensors(),
        out,
        query_start,
        query_end,
        state_slots,
        rows,
        tokens,
        record.inputs.shape[0],
        record.inputs.shape[1],
        max_query_len,
        key_dim**-0.5,
        norm_eps,
        *mixed_qkv.stride(),
        *z.stride(),
        *a.stride(),
        *b.stride(),
        *conv_weight.stride(),
        *conv_state.stride(),
        *ssm_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        K_HEADS=num_k_heads,
        V_HEADS=v_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        WIDTH=width,
        BLOCK_M=block_m,
        BLOCK_K=max(least, next_power_of_2(key_dim)),
        BLOCK_V=block_v,
        V_BLOCKS=next_power_of_2(cdiv(value_dim, block_v)),
        BLOCK_ROWS=BLOCK_ROWS,
        **options,
        num_warps=tile.num_warps,
    )


def gdn_verify_states(
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
    max_query_len: int,
    conv_slots: Tensor,
    initial_slots: Tensor,
    output_slots: Tensor,
    num_accepted_tokens: Tensor,
    out: Tensor,
) -> None:
    """See :func:`qwen3next_plugin.kernels.gdn.gdn_verify_states`; arguments are checked there.

    A program goes through the states of a key head's value heads ``BLOCK_V`` rows at a time: a tile is read once, is in
    registers from token to token, and is stored after each. All that counts is how fast states are written, if several
    programs share a multiprocessor and little is exchanged between threads: see :func:`.triton_formula.advance_parts`.
    """
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows, tokens, width = query_start.shape[0], mixed_qkv.shape[0], conv_weight.shape[1]
    block_m = next_power_of_2(max_query_len)
    tile = states_tile(table_of(ssm_state.device), ssm_state.element_size(), max_query_len, rows * v_heads) or UNRULED
    block_k, block_v = next_power_of_2(key_dim), min(tile.rows, next_power_of_2(value_dim))
    programs = max(rows, cdiv(tokens, max_query_len)) * num_k_heads
    scratch = torch.empty(programs, block_m, value_dim, dtype=torch.float32, device=out.device)
    gdn_verify_states_kernel[(programs,)](
        mixed_qkv,
        z,
        a,
        b,
        conv_weight,
        A_log.contiguous(),
        dt_bias.contiguous(),
        norm_weight.contiguous(),
        conv_state,
        ssm_state,
        out,
        scratch,
        query_start,
        query_end,
        conv_slots,
        initial_slots,
        output_slots,
        num_accepted_tokens,
        rows,
        tokens,
        max_query_len,
        key_dim**-0.5,
        norm_eps,
        *mixed_qkv.stride(),
        *z.stride(),
        *a.stride(),
        *b.stride(),
        *conv_weight.stride(),
        *conv_state.stride(),
        *ssm_state.stride(),
        *out.stride(),
        conv_slots.stride(0),
        initial_slots.stride(0),
        *output_slots.stride(),
        K_HEADS=num_k_heads,
        GROUP=v_heads // num_k_heads,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        WIDTH=width,
        BLOCK_M=block_m,
        LEVELS=block_m.bit_length() - 1,
        BLOCK_K=block_k,
        PARTS=max(1, block_k * ssm_state.element_size() // LINE),
        BLOCK_V=block_v,
        V_BLOCKS=next_power_of_2(cdiv(value_dim, block_v)),
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=tile.num_warps,
        maxnreg=REGISTERS,
    )
