"""The Gated DeltaNet backend inside SGLang: its state pool and its batches, our kernels."""

from __future__ import annotations

import logging
from typing import Any

import torch
from sglang.srt.layers.attention.hybrid_linear_attn_backend import MambaAttnBackendBase
from sglang.srt.layers.attention.linear import utils as linear_utils
from sglang.srt.runtime_context import get_exec, mamba_cache_chunk_size

from qwen3next_plugin.activation import state_type_advice
from qwen3next_plugin.errors import RegistrationError
from qwen3next_plugin.kernels.gdn import SNAPSHOT_GRID, DraftRecords, gdn_commit
from qwen3next_plugin.kernels.gdn.step import gdn_step

from .checks import is_qwen3_next
from .gdn_metadata import (
    PADDING,
    Qwen3NextGdnMetadata,
    decode_rows,
    draft_rows,
    masked_slots,
    prefill_rows,
)
from .gdn_peers import snapshot_grid

logger = logging.getLogger("sglang.qwen3next_plugin")

STOCK_BACKEND = ("sglang.srt.layers.attention.linear.gdn_backend", "GDNAttnBackend")


def make_gdn_backend(runner: Any) -> MambaAttnBackendBase:
    """The backend of `runner`'s Gated DeltaNet layers: ours for Qwen3-Next, SGLang's own for every other model.

    Stands in for SGLang's class of that name, which is called with a ModelRunner. Raises RegistrationError for a
    setting that our backend cannot serve.
    """
    if is_qwen3_next(runner.model_config):
        return Qwen3NextGdnBackend(runner)
    # Found, not imported: the name leads here. SGLang's hooks rewrite it wherever it was imported, here too.
    stock = next(
        cls for cls in MambaAttnBackendBase.__subclasses__() if (cls.__module__, cls.__qualname__) == STOCK_BACKEND
    )
    return stock(runner)


class Qwen3NextGdnBackend(MambaAttnBackendBase):
    """Runs the layers of a step from its row sets; one code path for prefill, decode and verification.

    The base class keeps what CUDA graphs need at fixed addresses: the slots and the query starts of captured batches.
    """

    needs_cpu_seq_lens: bool = False

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        pool = self.req_to_token_pool.mamba_pool
        _refuse_unservable(self.topk, pool)
        self.draft_records: DraftRecords | None = getattr(pool, "draft_records", None)
        self.snapshot_grid = snapshot_grid() or SNAPSHOT_GRID
        # Filled within a captured graph, which alone sees a replay's mask of rows to keep.
        self.snapshot_slots: torch.Tensor | None = None
        # SGLang has just logged kernels of its own, some of which it chooses by the GPU: say that they do not run.
        logger.info(
            "Gated DeltaNet layers run the kernels of qwen3next-plugin; --linear-attn-*-backend does not apply."
        )
        stored = str(pool.mamba_cache.temporal.dtype).removeprefix("torch.")
        advice = state_type_advice(stored, "--mamba-ssm-dtype")
        if advice:
            logger.warning(advice)

    # One step's rows.

    def init_forward_metadata(self, forward_batch: Any) -> None:
        """Rows of a step that runs eagerly, or whose prefill is captured in segments."""
        batch = forward_batch
        virtual = self.req_to_token_pool.get_mamba_indices(batch.req_pool_indices)
        # Padding rows name request row 0, and no request's state is in slot 0.
        slots = masked_slots(self._translate_mamba_indices(virtual), virtual > 0)
        mode = getattr(batch, "logical_forward_mode", batch.forward_mode)
        if mode.is_draft_extend_v2():
            self.forward_metadata = Qwen3NextGdnMetadata(slots)
        elif mode.is_decode_or_idle() or mode.is_target_verify():
            self.forward_metadata = self._token_rows(batch, mode, slots, self._query_start_loc(batch, mode))
        elif mode.is_extend():
            rows = prefill_rows(batch, slots, self._snapshot_slots_of(batch), self.snapshot_grid)
            self.forward_metadata = Qwen3NextGdnMetadata(slots, prefill=rows)
        else:
            raise ValueError(f"forward_mode is {mode}; Gated DeltaNet layers decode, verify, extend or idle")

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        """Rows of a batch that is captured or replayed whole: the base class fills fixed buffers, rows view them."""
        super().init_forward_metadata_out_graph(forward_batch, in_capture=in_capture)
        self._take_graph_buffers(forward_batch, forward_batch.forward_mode)

    def init_forward_metadata_in_graph(self, forward_batch: Any) -> None:
        """Recorded into the graph before the layers: which rows keep a snapshot in this replay, and where."""
        super().init_forward_metadata_in_graph(forward_batch)
        mask = getattr(forward_batch, "mamba_track_mask", None)
        decodes = forward_batch.forward_mode.is_decode_or_idle()
        if decodes and mask is not None and self.snapshot_slots is not None:
            rows = forward_batch.batch_size
            slots = masked_slots(self.mamba_track_indices_buf[:rows], mask[:rows])
            self.snapshot_slots[:rows].copy_(slots)

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens)
        self.snapshot_slots = torch.full_like(self.mamba_track_indices_buf, PADDING)

    def init_forward_metadata_capture_cpu_graph(self, *args: Any, **kwargs: Any) -> None:
        raise RegistrationError(
            "--enable-torch-compile on a CPU captures batches in a way that this plugin's Gated DeltaNet layers do not "
            "support; leave it out."
        )

    def _query_start_loc(self, batch: Any, mode: Any) -> torch.Tensor:
        if not mode.is_target_verify():
            return torch.arange(batch.batch_size + 1, dtype=torch.int32, device=self.device)
        ragged = getattr(batch.spec_info, "ragged_verify_layout", None)
        if ragged is not None:
            starts: torch.Tensor = ragged.qo_indptr_device
            return starts
        step = batch.spec_info.draft_token_num
        return torch.arange(0, batch.input_ids.shape[0] + 1, step, dtype=torch.int32, device=self.device)

    def _token_rows(
        self, batch: Any, mode: Any, slots: torch.Tensor, query_start_loc: torch.Tensor
    ) -> Qwen3NextGdnMetadata:
        if not mode.is_target_verify():
            rows = decode_rows(query_start_loc, slots, self._snapshot_slots_of(batch))
            return Qwen3NextGdnMetadata(slots, recurrent=rows)
        if self.draft_records is None:
            raise RegistrationError(
                "SGLang asks for a verification of drafts, but its state pool was made without room for them."
            )
        slots = slots[: query_start_loc.shape[0] - 1]
        drafts = draft_rows(query_start_loc, slots, batch.spec_info.draft_token_num)
        return Qwen3NextGdnMetadata(slots, drafts=drafts)

    def _take_graph_buffers(self, batch: Any, mode: Any) -> None:
        held: Any = self.forward_metadata  # the base class's own kind of it
        slots, query_start_loc = held.mamba_cache_indices, held.query_start_loc
        if mode.is_target_verify():
            self.forward_metadata = self._token_rows(batch, mode, slots, query_start_loc)
            return
        snapshot_slots = None
        if self.snapshot_slots is not None and getattr(batch, "mamba_track_indices", None) is not None:
            snapshot_slots = self.snapshot_slots[: slots.shape[0]]
        self.forward_metadata = Qwen3NextGdnMetadata(
            slots, recurrent=decode_rows(query_start_loc, slots, snapshot_slots)
        )

    def _snapshot_slots_of(self, batch: Any) -> torch.Tensor | None:
        if batch.mamba_track_mask is None or batch.mamba_track_indices is None:
            return None
        return masked_slots(self._translate_mamba_indices(batch.mamba_track_indices), batch.mamba_track_mask)

    # One layer of the step.

    def forward_decode(
        self, layer: Any, forward_batch: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return self._run(layer, mixed_qkv, a, b, kwargs.get("linear_attn_output"))

    def forward_extend(
        self, layer: Any, forward_batch: Any, mixed_qkv: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return self._run(layer, mixed_qkv, a, b, kwargs.get("linear_attn_output"))

    def _run(
        self, layer: Any, qkvz: torch.Tensor, a: torch.Tensor, b: torch.Tensor, out: torch.Tensor | None
    ) -> torch.Tensor:
        """Convolution, delta rule and gated norm of this step's rows.

        layer: the RadixLinearAttention of our layer; qkvz [T, conv_dim + num_v_heads * head_v_dim], what our layer
        gives SGLang as mixed_qkv; a, b [T, num_v_heads]; out [1, T, num_v_heads, head_v_dim] to fill, or None. Returns
        out; zeros for tokens in no row, which are padding, but are projected and routed all the same.
        """
        if out is None:
            out = qkvz.new_empty(1, qkvz.shape[0], layer.num_v_heads, layer.head_v_dim)
        rows = self.forward_metadata
        if rows.prefill is not None and qkvz.is_cuda and torch.cuda.is_current_stream_capturing():
            raise RegistrationError(
                "--cuda-graph-backend-prefill captures whole prefills, whose rows would be replayed as they were "
                "captured; set it to 'breakable'."
            )
        cache = self.req_to_token_pool.mamba2_layer_cache(layer.layer_id)
        drafts = None
        if rows.drafts is not None:
            assert self.draft_records is not None
            drafts = (rows.drafts, self.draft_records.layer(self.req_to_token_pool.mamba_map[layer.layer_id]))
        gdn_step(
            qkvz,
            a,
            b,
            layer.core_parameters(),
            cache.conv[0],
            cache.temporal,
            out[0],
            prefill=rows.prefill,
            recurrent=rows.recurrent,
            drafts=drafts,
        )
        return out

    # After a verification.

    def commit_drafts(
        self, last_tokens: torch.Tensor, snapshot_slots: torch.Tensor | None, snapshot_tokens: torch.Tensor | None
    ) -> None:
        """Move the states of all layers past what the last step's requests accepted, and keep what is to be cached.

        last_tokens [requests]: each one's last accepted token in the step; snapshot_slots, snapshot_tokens [requests]:
        where and after which token a state is kept besides, the token negative for none. Both None for none at all.
        """
        assert self.draft_records is not None
        requests = last_tokens.shape[0]
        cache = self.req_to_token_pool.mamba_pool.mamba_cache
        if snapshot_slots is not None and snapshot_tokens is not None:
            snapshot_slots = self._translate_mamba_indices(snapshot_slots)[:requests]
            snapshot_tokens = snapshot_tokens[:requests]
        gdn_commit(
            cache.conv[0],
            cache.temporal,
            self.draft_records,
            state_slots=self.forward_metadata.mamba_cache_indices[:requests],
            last_tokens=last_tokens,
            snapshot_slots=snapshot_slots,
            snapshot_tokens=snapshot_tokens,
        )


def _refuse_unservable(topk: int, pool: Any) -> None:
    """Raise RegistrationError for what was asked of the Gated DeltaNet layers and is not here."""
    if topk > 1:
        raise RegistrationError(
            f"--speculative-eagle-topk is {topk}, but the recurrent state of Qwen3-Next can be rolled back along a "
            "chain of drafts only, not along a tree; set it to 1."
        )
    if getattr(pool, "enable_linear_replayssm", False) or getattr(pool, "enable_linear_replayssm_spec", False):
        raise RegistrationError(
            "--enable-linear-replayssm and --enable-linear-replayssm-spec change how SGLang's own kernels keep the "
            "recurrent state, and this plugin runs its own; leave them out."
        )
    if get_exec().mamba.enable_mamba_extra_buffer and mamba_cache_chunk_size() % SNAPSHOT_GRID:
        raise RegistrationError(
            f"SGLang would keep states every {mamba_cache_chunk_size()} tokens of a prompt, but they can be had every "
            f"{SNAPSHOT_GRID} tokens only; set --page-size to 1 or to a multiple of {SNAPSHOT_GRID}."
        )
    stable_rows = getattr(linear_utils, "pp_spec_stable_rows_enabled", None)
    if stable_rows is not None and stable_rows():
        raise RegistrationError(
            "SGLANG_ENABLE_PP_SPEC is set, but Qwen3-Next has no pipeline parallelism in SGLang; unset it."
        )
