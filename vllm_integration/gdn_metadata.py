"""What a Gated DeltaNet layer must know of a step, built once a step from vLLM's scheduler metadata.

vLLM gives every request a row of state blocks: one block, or 1 + num_speculative_tokens with MTP. During a verify step
the state after draft token j is written to block j; the next step starts from block num_accepted - 1. That choice of
block is the whole rollback.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionMetadata,
    AttentionMetadataBuilder,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.gdn_attn import GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor
from vllm.v1.kv_cache_interface import AttentionSpec, MambaSpec

from qwen3next_plugin.kernels.gdn import PackedRows
from qwen3next_plugin.kernels.gdn.step import PrefillRows, RecurrentRows


class Qwen3NextGdnBackend(AttentionBackend):
    """Names the metadata builder of this plugin's Gated DeltaNet layers; other GDN models keep vLLM's own backend."""

    @staticmethod
    def get_name() -> str:
        return "QWEN3NEXT_GDN"

    @staticmethod
    def get_builder_cls() -> type[Qwen3NextGdnMetadataBuilder]:
        return Qwen3NextGdnMetadataBuilder

    @classmethod
    def is_ssm(cls) -> bool:
        return True


@dataclass
class Qwen3NextGdnMetadata(AttentionMetadata):
    """The rows of one step; a row set is None when no request of the step needs it."""

    prefill: PrefillRows | None
    recurrent: RecurrentRows | None


class _GraphBuffers:
    """Recurrent rows at fixed addresses, so that a captured CUDA graph replays with each step's rows."""

    def __init__(self, max_rows: int, num_slots: int, device: torch.device) -> None:
        def rows(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.int32, device=device)

        self.query_start_loc = rows(max_rows + 1)
        self.initial_slots, self.output_slots = rows(max_rows), rows(max_rows, num_slots)
        self.num_accepted_tokens = rows(max_rows)

    def hold(self, rows: RecurrentRows, query_start_loc: torch.Tensor) -> RecurrentRows:
        """Copies `rows`, all of a step, into the buffers and returns views of them of the same size.

        Every copy is a launch that a step waits for, and each group of layers makes its own: what is the same tensor
        twice is copied once.
        """

        def keep(buffer: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            view = buffer[: value.shape[0]]
            view.copy_(value, non_blocking=True)
            return view

        starts = keep(self.query_start_loc, query_start_loc)
        slots = keep(self.output_slots, rows.output_slots)
        initial_slots, accepted = slots[:, 0], rows.num_accepted_tokens
        if accepted is not None:
            initial_slots = keep(self.initial_slots, rows.initial_slots)
            accepted = keep(self.num_accepted_tokens, accepted)
        return RecurrentRows(
            query_start=starts[:-1],
            query_end=starts[1:],
            conv_slots=slots[:, 0],
            initial_slots=initial_slots,
            output_slots=slots,
            num_accepted_tokens=accepted,
            max_query_len=rows.max_query_len,
        )


class Qwen3NextGdnMetadataBuilder(GDNAttentionMetadataBuilder):
    """Splits a step into prefill and recurrent rows.

    The base class is here for its type only: vLLM's model runners hand num_accepted_tokens to its instances. None of
    its code runs.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    reorder_batch_threshold: int | None = 1
    supports_update_block_table: bool = False

    def __init__(
        self, kv_cache_spec: AttentionSpec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device
    ) -> None:
        AttentionMetadataBuilder.__init__(self, kv_cache_spec, layer_names, vllm_config, device)
        assert isinstance(kv_cache_spec, MambaSpec)
        speculative = vllm_config.speculative_config
        self.num_spec = speculative.num_speculative_tokens or 0 if speculative else 0
        self._init_reorder_batch_threshold(1, supports_spec_as_decode=self.num_spec > 0)
        self.cache_mode = vllm_config.cache_config.mamba_cache_mode
        self.graph_buffers: _GraphBuffers | None = None
        compilation = vllm_config.compilation_config
        if compilation.cudagraph_mode.has_full_cudagraphs():
            # Padding to a captured size can exceed the requests that may run; a row beyond the buffers would replay
            # what was captured, so there is room for both.
            max_rows = max(vllm_config.scheduler_config.max_num_seqs, compilation.max_cudagraph_capture_size or 0)
            self.graph_buffers = _GraphBuffers(max_rows, 1 + self.num_spec, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        num_accepted_tokens: torch.Tensor | None = None,
        num_decode_draft_tokens_cpu: torch.Tensor | None = None,
        fast_build: bool = False,
    ) -> Qwen3NextGdnMetadata:
        """Rows of one step.

        num_decode_draft_tokens_cpu [num_reqs]: -1 where the request is still in its prompt; num_accepted_tokens
        [num_reqs]: tokens the previous step kept. Both None without MTP.
        """
        m = common_attn_metadata
        slots = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, self.cache_mode)
        slots = slots[: m.num_reqs, : 1 + self.num_spec]
        query_lens_cpu = m.query_start_loc_cpu.diff()
        is_recurrent = self._recurrent_rows(m, query_lens_cpu, num_decode_draft_tokens_cpu)
        num_recurrent = int(is_recurrent.sum())

        if num_recurrent == m.num_reqs:
            rows = self._recurrent(m, slots, slice(None), num_accepted_tokens)
            if self.graph_buffers is not None:
                rows = self.graph_buffers.hold(rows, m.query_start_loc)
            return Qwen3NextGdnMetadata(prefill=None, recurrent=rows)

        # Batches come decode first as a rule, and then both selections are slices; an index costs a copy to the GPU.
        selections: list[slice | torch.Tensor]
        if bool(is_recurrent[:num_recurrent].all()):
            selections = [slice(0, num_recurrent), slice(num_recurrent, None)]
        else:
            to_device = {"device": slots.device, "non_blocking": True}
            selections = [part.nonzero().squeeze(1).to(**to_device) for part in (is_recurrent, ~is_recurrent)]
        recurrent = self._recurrent(m, slots, selections[0], num_accepted_tokens) if num_recurrent else None
        max_query_len = int(query_lens_cpu[~is_recurrent].max())
        packed = self._packed(m.query_start_loc_cpu, ~is_recurrent, slots.device)
        return Qwen3NextGdnMetadata(self._prefill(m, slots, selections[1], max_query_len, packed), recurrent)

    def _recurrent_rows(
        self, m: CommonAttentionMetadata, query_lens_cpu: torch.Tensor, drafts_cpu: torch.Tensor | None
    ) -> torch.Tensor:
        """Host mask [num_reqs]: rows that run token by token. Padding rows (no tokens) count as such and do nothing."""
        if self.num_spec and drafts_cpu is not None:
            # A decode row without drafts stays here: only verify rows start at the accepted token's state.
            return (drafts_cpu[: m.num_reqs] >= 0) | (query_lens_cpu == 0)
        recurrent = query_lens_cpu <= 1
        if m.is_prefilling is not None:
            assert m.seq_lens_cpu_upper_bound is not None
            # The first token of a one-token prompt has no state to start from.
            first = (m.seq_lens_cpu_upper_bound[: m.num_reqs] <= query_lens_cpu) & m.is_prefilling[: m.num_reqs]
            recurrent &= ~first | (query_lens_cpu == 0)
        return recurrent

    def _recurrent(
        self,
        m: CommonAttentionMetadata,
        slots: torch.Tensor,
        select: slice | torch.Tensor,
        num_accepted_tokens: torch.Tensor | None,
    ) -> RecurrentRows:
        slots = slots[select]
        conv_slots = initial_slots = slots[:, 0]
        accepted = None
        if self.num_spec and num_accepted_tokens is not None:
            accepted = num_accepted_tokens[: m.num_reqs][select].clamp(1, 1 + self.num_spec)
            initial_slots = slots.gather(1, (accepted - 1).long().unsqueeze(1)).squeeze(1)
        return RecurrentRows(
            query_start=m.query_start_loc[:-1][select],
            query_end=m.query_start_loc[1:][select],
            conv_slots=conv_slots,
            initial_slots=initial_slots,
            output_slots=slots,
            num_accepted_tokens=accepted,
            max_query_len=1 + self.num_spec if accepted is not None else 1,
        )

    @staticmethod
    def _packed(query_start_loc_cpu: torch.Tensor, rows: torch.Tensor, device: torch.device) -> PackedRows | None:
        """The prefill rows as the host knows them, if no other row's tokens lie between theirs."""
        starts, ends = query_start_loc_cpu[:-1][rows], query_start_loc_cpu[1:][rows]
        if not torch.equal(starts[1:], ends[:-1]):
            return None
        return PackedRows.of((ends - starts).tolist(), device, int(starts[0]))

    @staticmethod
    def _prefill(
        m: CommonAttentionMetadata,
        slots: torch.Tensor,
        select: slice | torch.Tensor,
        max_query_len: int,
        packed: PackedRows | None,
    ) -> PrefillRows:
        return PrefillRows(
            query_start=m.query_start_loc[:-1][select],
            query_end=m.query_start_loc[1:][select],
            state_slots=slots[:, 0][select],
            has_initial_state=m.compute_num_computed_tokens()[: m.num_reqs][select] > 0,
            max_query_len=max_query_len,
            packed=packed,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata: CommonAttentionMetadata) -> Qwen3NextGdnMetadata:
        """Rows of a capture batch: decode or verify only, every row with its full number of tokens."""
        m = common_attn_metadata
        if not self.num_spec:
            return self.build(0, m)
        return self.build(0, m, m.query_start_loc.diff(), m.query_start_loc_cpu.diff() - 1)
