"""CPU versions of the two Triton kernels that move recurrent state between cache blocks, for MTP with prefix caching.

vLLM has no Triton on a CPU and replaces its kernels one by one through `vllm.triton_utils.dispatcher`; these two were
left out up to 0.32.0, so that the first request with MTP and prefix caching (mamba_cache_mode "align") stops the engine
with "'function' object is not subscriptable".

What has to hold. A request owns a row of the block table; column c holds the state after (c + 1) * block_size tokens
once that block is full. A verify step of n tokens that starts at C computed tokens runs in column s =
ceil((C + n) / block_size) - 1: the recurrent state after its token j goes to column s + j, and all of its convolution
inputs go to the window of column s, where the history of token j + 1 begins at row j. So "the state after token j"
means two different copies: the recurrent state whole, from the block of column s + j; the convolution window from the
block of column s, moved down by j rows.

- before a step (`precopy`): if the step runs in another column than the last one, the state after the last accepted
  token goes there, and the step reads it as if one token had been accepted;
- after a step (`postprocess`): if the accepted tokens reached or passed a multiple of block_size, the state at that
  multiple goes to the column that is now full, where the prefix cache looks for it.

States arrive as vLLM's GPU kernels take them: base address, bytes a block, element size and so on, one entry a (layer,
state). They are moved by address.
"""

from __future__ import annotations

import ctypes
import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from qwen3next_plugin.errors import DriftError

KERNEL_MODULE = "vllm.v1.worker.mamba_utils"


def register_cpu_kernels() -> tuple[str, ...]:
    """Gives vLLM the CPU versions; returns the names of the kernels now replaced. Safe to call again.

    Nothing happens where vLLM found a Triton that can run (then its own kernels are used), and a kernel that vLLM has
    already replaced itself is left alone. Raises DriftError where a kernel is gone or takes other arguments than those
    this module was written for.
    """
    from vllm.triton_utils import HAS_TRITON
    from vllm.triton_utils.dispatcher import KernelOverride, register_kernels
    from vllm.v1.worker import mamba_utils

    if HAS_TRITON:
        return ()
    overrides: dict[str, Callable[..., Any]] = {}
    for kernel in (precopy_mamba_align_fused_kernel, postprocess_mamba_fused_kernel):
        name = kernel.__name__
        original = getattr(mamba_utils, name, None)
        if original is None:
            raise DriftError(
                f"vLLM has no {KERNEL_MODULE}.{name} any more, which this plugin replaces on a CPU to make MTP and "
                "prefix caching work together; use a supported vLLM version or start with --no-enable-prefix-caching."
            )
        if isinstance(original, KernelOverride):
            continue
        expected, found = list(inspect.signature(kernel).parameters), _parameter_names(original)
        if found != expected:
            differing = sorted(set(found) ^ set(expected)) or ["their order"]
            raise DriftError(
                f"vLLM's {KERNEL_MODULE}.{name} takes other arguments than this plugin's CPU version of it "
                f"(difference: {', '.join(differing)}); use a supported vLLM version or start with "
                "--no-enable-prefix-caching."
            )
        overrides[f"{KERNEL_MODULE}.{name}"] = kernel
    if overrides:
        register_kernels(overrides)
    return tuple(overrides)


def _parameter_names(kernel: Any) -> list[str]:
    """Argument names of a Triton kernel, or of the plain function that stands there where Triton is absent."""
    return list(getattr(kernel, "arg_names", None) or inspect.signature(kernel).parameters)


def precopy_mamba_align_fused_kernel(
    mamba_state_idx_ptr: torch.Tensor,
    src_col_ptr: torch.Tensor,
    token_bias_ptr: torch.Tensor,
    block_table_ptrs_ptr: torch.Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: torch.Tensor,
    state_block_strides_ptr: torch.Tensor,
    state_elem_sizes_ptr: torch.Tensor,
    state_inner_sizes_ptr: torch.Tensor,
    state_conv_widths_ptr: torch.Tensor,
    state_group_indices_ptr: torch.Tensor,
    state_dim_row_count_ptr: torch.Tensor,
    state_dim_row_stride_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor | None,
    num_reqs: int,
    COPY_BLOCK_SIZE: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = True,
    TEMPORAL_TILES: int = 1,
) -> None:
    """Before a step: bring each request's last accepted state to the column in which the step runs.

    Per request (int32, indexed through idx_mapping_ptr where given): the step's column mamba_state_idx_ptr, the last
    step's column src_col_ptr (-1: no state yet), and token_bias_ptr = accepted tokens of the last step - 1.
    """
    states = _States(
        block_table_ptrs_ptr,
        block_table_stride_req,
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        CONV_STATE_DIM_FIRST,
    )
    for row in _rows(num_reqs, idx_mapping_ptr if HAS_IDX_MAPPING else None):
        source, target = int(src_col_ptr[row]), int(mamba_state_idx_ptr[row])
        if source >= 0 and source != target:
            states.copy(row, source, target, int(token_bias_ptr[row]))


def postprocess_mamba_fused_kernel(
    num_accepted_tokens_ptr: torch.Tensor,
    mamba_state_idx_ptr: torch.Tensor,
    num_scheduled_tokens_ptr: torch.Tensor | None,
    num_computed_tokens_ptr: torch.Tensor,
    num_draft_tokens_ptr: torch.Tensor | None,
    block_table_ptrs_ptr: torch.Tensor,
    block_table_stride_req: int,
    state_base_addrs_ptr: torch.Tensor,
    state_block_strides_ptr: torch.Tensor,
    state_elem_sizes_ptr: torch.Tensor,
    state_inner_sizes_ptr: torch.Tensor,
    state_conv_widths_ptr: torch.Tensor,
    state_group_indices_ptr: torch.Tensor,
    state_dim_row_count_ptr: torch.Tensor,
    state_dim_row_stride_ptr: torch.Tensor,
    num_accepted_tokens_out_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor | None,
    num_reqs: int,
    block_size: int,
    COPY_BLOCK_SIZE: int,
    CONV_STATE_DIM_FIRST: bool,
    HAS_IDX_MAPPING: bool = False,
    PRECOMPUTED_NEW_COMPUTED: bool = False,
    TEMPORAL_TILES: int = 1,
) -> None:
    """After a step: keep the state at a multiple of block_size that the accepted tokens reached or passed.

    Per request (int32): accepted tokens (1 + drafts kept), the step's column, scheduled tokens, tokens computed before
    the step (after it, if PRECOMPUTED_NEW_COMPUTED) and drafts among the scheduled. Where the kept state lands in the
    step's own column, it lies there like a single token's from now on, and num_accepted_tokens_out_ptr becomes 1.
    """
    states = _States(
        block_table_ptrs_ptr,
        block_table_stride_req,
        state_base_addrs_ptr,
        state_block_strides_ptr,
        state_elem_sizes_ptr,
        state_inner_sizes_ptr,
        state_conv_widths_ptr,
        state_group_indices_ptr,
        state_dim_row_count_ptr,
        state_dim_row_stride_ptr,
        CONV_STATE_DIM_FIRST,
    )
    for row in _rows(num_reqs, idx_mapping_ptr if HAS_IDX_MAPPING else None):
        accepted, source = int(num_accepted_tokens_ptr[row]), int(mamba_state_idx_ptr[row])
        computed = int(num_computed_tokens_ptr[row])
        if PRECOMPUTED_NEW_COMPUTED:
            after_first = computed - accepted + 1
        else:
            assert num_scheduled_tokens_ptr is not None and num_draft_tokens_ptr is not None
            after_first = computed + int(num_scheduled_tokens_ptr[row]) - int(num_draft_tokens_ptr[row])
        # `after_first` tokens stand in the step's own column; `boundary` is the last multiple among the accepted.
        boundary = (after_first + accepted - 1) // block_size * block_size
        if boundary < after_first:
            continue
        target = boundary // block_size - 1
        states.copy(row, source, target, boundary - after_first)
        if source == target:
            num_accepted_tokens_out_ptr[row] = 1


def _rows(num_reqs: int, idx_mapping: torch.Tensor | None) -> Iterator[int]:
    """Rows of the block tables of one batch; a negative entry of idx_mapping stands for no request."""
    if idx_mapping is None:
        yield from range(num_reqs)
    else:
        yield from (row for row in idx_mapping[:num_reqs].tolist() if row >= 0)


@dataclass(frozen=True)
class _State:
    """Where the blocks of one (layer, state) lie; sizes in bytes. `window` is 0 for a recurrent state."""

    address: int
    block_stride: int
    group: int
    content: int
    window: int
    token: int
    num_lines: int
    line_stride: int


class _States:
    """All states of a model by address, and the block tables that say which block a request's column is."""

    def __init__(
        self,
        tables: torch.Tensor,
        table_stride: int,
        addresses: torch.Tensor,
        block_strides: torch.Tensor,
        element_sizes: torch.Tensor,
        inner_sizes: torch.Tensor,
        windows: torch.Tensor,
        groups: torch.Tensor,
        line_counts: torch.Tensor,
        line_strides: torch.Tensor,
        window_last: bool,
    ) -> None:
        self.tables, self.table_stride = tables, table_stride
        self.columns = (
            addresses,
            block_strides,
            element_sizes,
            inner_sizes,
            windows,
            groups,
            line_counts,
            line_strides,
        )
        self.window_last = window_last
        self._list: list[_State] | None = None

    @property
    def all(self) -> list[_State]:
        """Built at the first copy of a step: most steps copy nothing."""
        if self._list is None:
            self._list = [self._read(*entry) for entry in zip(*(c.tolist() for c in self.columns), strict=True)]
        return self._list

    def _read(
        self,
        address: int,
        block_stride: int,
        element: int,
        inner: int,
        window: int,
        group: int,
        num_lines: int,
        line_stride: int,
    ) -> _State:
        if not (window and self.window_last):
            num_lines, line_stride = 1, 0
        # Addresses above 2**63 come as negative int64.
        return _State(
            address % 2**64, block_stride, group, inner * element, window, inner * element, num_lines, line_stride
        )

    def copy(self, row: int, source: int, target: int, token: int) -> None:
        """Copies the state after token `token` of a step that ran in column `source` to column `target`, all layers."""
        if source == target and token == 0:
            return
        for state in self.all:
            if state.window == 0:
                self._move(state, row, source + token, target, 0, state.content)
            else:
                self._move(state, row, source, target, token * state.token, (state.window - token) * state.token)

    def _move(self, state: _State, row: int, source: int, target: int, skip: int, size: int) -> None:
        """Moves `size` bytes from `skip` on, once a line, to the start of the target block; the two may overlap."""
        table = int(self.tables[state.group]) % 2**64 + 4 * row * self.table_stride
        blocks = ctypes.c_int32 * (max(source, target) + 1)
        columns = blocks.from_address(table)
        origin = state.address + columns[source] * state.block_stride + skip
        goal = state.address + columns[target] * state.block_stride
        for line in range(state.num_lines):
            ctypes.memmove(goal + line * state.line_stride, origin + line * state.line_stride, size)
