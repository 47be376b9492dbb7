"""Chunked prefill in Triton over workspaces in tiles, for bfloat16 tokens and heads of 64 or 128: inverse "merging".

Three launches: gates of all heads of a chunk (:mod:`.triton_tiles`), what its tokens do to each other, and the walk
(:mod:`.triton_walk`). Formula and names are those of :mod:`.triton_prefill`; there as here q and k enter the matrix
products as they come. A chunk and head of 128 takes 40 KiB of workspaces until the walk is done, however short the row.
"""

import torch
import triton.language as tl
from torch import Tensor

from ..integers import next_power_of_2
from ..ranges import BLOCK_ROWS, max_chunks
from .reference import SNAPSHOT_GRID, Gates
from .table import OwnPrefill
from .triton_tiles import chunk_kernel, gates_kernel
from .triton_walk import walk_kernel

CHUNK = SNAPSHOT_GRID
BLOCK_V = 64  # columns of the state that a program of the walk holds; of fewer, see triton_prefill
SIZES = (64, 128)


def can_take(mixed_qkv: Tensor, key_dim: int, value_dim: int) -> bool:
    """Whether these kernels are for tokens of such a type and heads of such sizes."""
    return mixed_qkv.dtype == torch.bfloat16 and key_dim in SIZES and value_dim in SIZES


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
    built: OwnPrefill,
) -> None:
    """As :func:`.triton_prefill.gdn_prefill`, of what :func:`can_take` takes; ``built``: with which warps and so on."""
    a, b, A_log, dt_bias = gates
    _, v_heads, value_dim, key_dim = ssm_state.shape
    rows = query_start.shape[0]
    chunks = max_chunks(mixed_qkv.shape[0], rows, CHUNK, max_query_len)
    # The interpreter has no products of bfloat16.
    dot = mixed_qkv.dtype if mixed_qkv.is_cuda else torch.float32

    def workspace(*shape: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=mixed_qkv.device)

    W = workspace(chunks, v_heads, CHUNK, key_dim, dtype=dot)
    U = workspace(chunks, v_heads, CHUNK, value_dim, dtype=dot)
    P = workspace(chunks, v_heads, CHUNK, CHUNK, dtype=dot)
    decays, strengths, q_scales, k_scales = workspace(4, chunks, v_heads, CHUNK, dtype=torch.float32).unbind()
    carries = workspace(chunks, v_heads, dtype=torch.float32)
    places = workspace(chunks, 2, dtype=torch.int64)
    first_numbers = workspace(rows, dtype=torch.int32)
    shared = {
        "K_HEADS": num_k_heads,
        "V_HEADS": v_heads,
        "KEY_DIM": key_dim,
        "VALUE_DIM": value_dim,
        "CHUNK": CHUNK,
        "DOT": tl.bfloat16 if dot == torch.bfloat16 else tl.float32,
    }
    gates_kernel[(chunks,)](
        a,
        b,
        A_log.contiguous(),
        dt_bias.contiguous(),
        places,
        first_numbers,
        decays,
        strengths,
        query_start,
        query_end,
        state_slots,
        rows,
        *a.stride(),
        *b.stride(),
        state_slots.stride(0),
        V_HEADS=v_heads,
        BLOCK_HEADS=next_power_of_2(v_heads),
        CHUNK=CHUNK,
        BLOCK_ROWS=BLOCK_ROWS,
        num_warps=4,
    )
    chunk_kernel[(chunks * v_heads,)](
        mixed_qkv,
        places,
        decays,
        strengths,
        W,
        U,
        P,
        q_scales,
        k_scales,
        carries,
        key_dim**-0.5,
        *mixed_qkv.stride(),
        num_warps=built.chunk_warps,
        maxnreg=built.chunk_registers,
        num_stages=1,
        **shared,
    )
    walk_kernel[(rows * v_heads * (value_dim // BLOCK_V),)](
        mixed_qkv,
        W,
        U,
        P,
        q_scales,
        k_scales,
        carries,
        ssm_state,
        out,
        query_start,
        query_end,
        state_slots,
        has_initial_state,
        *(snapshot or (query_start, query_start)),
        first_numbers,
        *mixed_qkv.stride(),
        *ssm_state.stride(),
        *out.stride(),
        state_slots.stride(0),
        BLOCK_V=BLOCK_V,
        HAS_SNAPSHOT=snapshot is not None,
        num_warps=4,
        num_stages=built.walk_stages,
        **shared,
    )
