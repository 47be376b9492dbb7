"""SGLang's own state pool, batches and hybrid backend around our Gated DeltaNet backend; and what must be in the pool.

Two linear layers with a full one between them; requests are rows 1.. of SGLang's request table. Everything of the pool
that nothing was written to is NaN.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from sglang.srt import runtime_context
from sglang.srt.configs.mamba_utils import Mamba2StateDType, Mamba2StateShape
from sglang.srt.layers.attention.hybrid_linear_attn_backend import HybridLinearAttnBackend
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin import demo
from qwen3next_plugin.sglang_integration.config import Qwen3NextCacheParams
from qwen3next_plugin.sglang_integration.gdn_backend import Qwen3NextGdnBackend
from tests.cpu.sglang.gdn_sequences import (
    FULL_LAYER,
    K_HEADS,
    KEY_DIM,
    LINEAR_LAYERS,
    V_HEADS,
    VALUE_DIM,
    WIDTH,
    History,
    Inputs,
    cut,
    formula,
    join,
    make_inputs,
    make_layer,
)
from tests.helpers import relative_error

NUM_SLOTS, NUM_REQUESTS = 14, 4


@lru_cache(maxsize=1)
def _server_args() -> ServerArgs:
    checkpoint = Path(demo.__file__).parent / "checkpoint"
    arguments: dict[str, Any] = {"mamba_radix_cache_strategy": "extra_buffer", "speculative_algorithm": "NEXTN"}
    return ServerArgs(model_path=str(checkpoint), device="cpu", attention_backend="torch_native", **arguments)


def publish() -> None:
    """Publish a server's settings in this process: they say whether and where states are kept for the radix tree.

    Anew each time, since other tests publish others.
    """
    runtime_context.publish(_server_args(), role="scheduler")


class Harness:
    """One rank's linear attention: pool, layers, backend, and the sequences of the requests in it."""

    def __init__(
        self, *, num_drafts: int = 0, ssm_dtype: torch.dtype = torch.float32, topk: int = 1, **options: Any
    ) -> None:
        self.num_tokens = num_drafts + 1
        self.tolerance = 1e-5 if ssm_dtype == torch.float32 else 4e-2  # the norm magnifies a small head
        shape = Mamba2StateShape.create(
            tp_world_size=1,
            intermediate_size=V_HEADS * VALUE_DIM,
            n_groups=K_HEADS,
            num_heads=V_HEADS,
            head_dim=VALUE_DIM,
            state_size=KEY_DIM,
            conv_kernel=WIDTH,
        )
        self.pool = HybridReqToTokenPool(
            size=NUM_REQUESTS,
            mamba_size=NUM_SLOTS,
            mamba_spec_state_size=NUM_REQUESTS,
            max_context_len=2048,
            device="cpu",
            enable_memory_saver=False,
            cache_params=Qwen3NextCacheParams(
                shape=shape,
                layers=list(LINEAR_LAYERS),
                dtype=Mamba2StateDType(conv=torch.bfloat16, temporal=ssm_dtype),
            ),
            mamba_layer_ids=list(LINEAR_LAYERS),
            enable_mamba_extra_buffer=True,
            speculative_num_draft_tokens=self.num_tokens if num_drafts else None,
            speculative_eagle_topk=topk if num_drafts else None,
            **options,
        )
        self.cache = self.pool.mamba_pool.mamba_cache
        for state in self._states():
            state.fill_(float("nan"))
        self.slot_of = {row: 2 * row for row in range(1, NUM_REQUESTS + 1)}
        for row, slot in self.slot_of.items():
            self.pool.req_index_to_mamba_index_mapping[row] = slot
        self.layers = {layer: make_layer(layer) for layer in LINEAR_LAYERS}
        self.runner = SimpleNamespace(
            server_args=SimpleNamespace(enable_mis=False),
            device="cpu",
            is_draft_worker=False,
            req_to_token_pool=self.pool,
            token_to_kv_pool=None,
        )
        with runtime_context.get_spec().override(speculative_eagle_topk=topk):
            self.backend = Qwen3NextGdnBackend(self.runner)
        self.hybrid = HybridLinearAttnBackend(_FullAttention(self.pool), self.backend, [FULL_LAYER])
        self.sequences = {row: History() for row in self.slot_of}
        self.kept: dict[int, tuple[int, int]] = {}  # slot of a snapshot -> (row, length) it must hold

    def _states(self) -> list[torch.Tensor]:
        records = getattr(self.pool.mamba_pool, "draft_records", None)
        return [self.cache.conv[0], self.cache.temporal, *(records.tensors() if records is not None else ())]

    # Batches as SGLang makes them.

    def batch(self, mode: ForwardMode, rows: Sequence[int], lengths: Sequence[int], **fields: Any) -> ForwardBatch:
        before = torch.tensor([len(self.sequences[row]) if row else 1 for row in rows], dtype=torch.int64)
        lens = torch.tensor(lengths, dtype=torch.int64)
        tokens = int(lens.sum())
        extends = {}
        if mode.is_extend() and not mode.is_target_verify():
            extends = {
                "extend_seq_lens": lens.int(),
                "extend_prefix_lens": torch.where(torch.tensor(rows) > 0, before, 0).int(),
                "extend_start_loc": (lens.cumsum(0) - lens).int(),
                "extend_seq_lens_cpu": list(lengths),
                "extend_num_tokens": tokens,
            }
        return ForwardBatch(
            forward_mode=mode,
            batch_size=len(rows),
            input_ids=torch.zeros(tokens, dtype=torch.int64),
            req_pool_indices=torch.tensor(rows, dtype=torch.int64),
            seq_lens=before + lens,
            out_cache_loc=torch.zeros(tokens, dtype=torch.int64),
            seq_lens_sum=int((before + lens).sum()),
            **extends,
            **fields,
        )

    def forward(self, batch: ForwardBatch, inputs: Mapping[int, Inputs]) -> dict[int, torch.Tensor]:
        """All linear layers of a step whose metadata stands; [T, V_HEADS, VALUE_DIM] a layer."""
        outputs = {}
        for layer, parts in inputs.items():
            out = self.hybrid.forward(
                layer=self.layers[layer], forward_batch=batch, mixed_qkv=parts[0], a=parts[1], b=parts[2]
            )
            assert out.shape == (1, len(parts[0]), V_HEADS, VALUE_DIM)
            outputs[layer] = out[0]
        return outputs

    # Steps, each with its check.

    def extend(
        self, rows: Sequence[int], lengths: Sequence[int], keep: Mapping[int, tuple[int, int]] | None = None
    ) -> None:
        """Continue the prompts of `rows`; row 0 is padding. keep: row -> (slot, tokens after which to keep a state).

        The scheduler names a length, or one more where the snapshot is not at the chunk's end.
        """
        keep = keep or {}
        ends = [len(self.sequences[row]) + length if row else 0 for row, length in zip(rows, lengths, strict=True)]
        marks, slots = [], []
        for row, length, end in zip(rows, lengths, ends, strict=True):
            slot, after = keep.get(row, (0, -1))
            at_end = after == length // 64 * 64
            marks.append(-1 if after < 0 else end if at_end else end - length + after + 1)
            slots.append(slot)
        fields = tracking(slots, [row in keep for row in rows])
        batch = self.batch(ForwardMode.EXTEND, rows, lengths, mamba_track_seqlens=torch.tensor(marks), **fields)
        inputs = self.draw(sum(lengths))
        self.hybrid.init_forward_metadata(batch)
        outputs = self.forward(batch, inputs)
        for row, (slot, after) in keep.items():
            self.kept[slot] = (row, len(self.sequences[row]) + after)
        self.settle(rows, lengths, inputs, outputs)

    def decode(self, rows: Sequence[int], keep: Mapping[int, int] | None = None) -> None:
        """One token a row; keep: row -> slot of a snapshot."""
        keep = keep or {}
        fields = tracking([keep.get(row, 0) for row in rows], [row in keep for row in rows])
        batch = self.batch(ForwardMode.DECODE, rows, [1] * len(rows), **fields)
        inputs = self.draw(len(rows))
        self.hybrid.init_forward_metadata(batch)
        outputs = self.forward(batch, inputs)
        for row, slot in keep.items():
            self.kept[slot] = (row, len(self.sequences[row]) + 1)
        self.settle(rows, [1] * len(rows), inputs, outputs)

    def verify(
        self, rows: Sequence[int], accepted: Sequence[int], keep: Mapping[int, tuple[int, int]] | None = None
    ) -> None:
        """num_tokens tokens a row, of which the first `accepted` are kept; keep: row -> (slot, step of a snapshot)."""
        batch = self.verify_batch(rows)
        inputs = self.draw(self.num_tokens * len(rows))
        self.hybrid.init_forward_metadata(batch)
        before = [state.clone() for state in self._states()[:2]]
        outputs = self.forward(batch, inputs)
        for state, old in zip(self._states()[:2], before, strict=True):
            assert torch.equal(_bits(state), _bits(old)), "verification moved a state before the commit"
        self.commit(rows, accepted, inputs, outputs, keep or {})

    def verify_batch(self, rows: Sequence[int]) -> ForwardBatch:
        spec = SimpleNamespace(draft_token_num=self.num_tokens, ragged_verify_layout=None, retrieve_next_token=None)
        lengths = [self.num_tokens] * len(rows)
        return self.batch(ForwardMode.TARGET_VERIFY, rows, lengths, spec_info=spec)

    def commit(
        self,
        rows: Sequence[int],
        accepted: Sequence[int],
        inputs: Mapping[int, Inputs],
        outputs: Mapping[int, torch.Tensor],
        keep: Mapping[int, tuple[int, int]],
    ) -> None:
        """The commit as SGLang calls for it, and what must be true of outputs and states after it."""
        real = [row for row in rows if row]
        self.hybrid.update_mamba_state_after_mtp_verify(
            last_correct_step_indices=torch.tensor(accepted)[: len(real)] - 1,
            mamba_track_indices=torch.tensor([keep.get(row, (0, -1))[0] for row in real]) if keep else None,
            mamba_steps_to_track=torch.tensor([keep.get(row, (0, -1))[1] for row in real]) if keep else None,
            model=None,
        )
        for row, (slot, step) in keep.items():
            self.kept[slot] = (row, len(self.sequences[row]) + step + 1)
        self.settle(rows, [self.num_tokens] * len(rows), inputs, outputs, accepted)

    def draw(self, tokens: int) -> dict[int, Inputs]:
        return {layer: make_inputs(tokens) for layer in LINEAR_LAYERS}

    def settle(
        self,
        rows: Sequence[int],
        lengths: Sequence[int],
        inputs: Mapping[int, Inputs],
        outputs: Mapping[int, torch.Tensor],
        accepted: Sequence[int] | None = None,
    ) -> None:
        start = 0
        for n, (row, length) in enumerate(zip(rows, lengths, strict=True)):
            here = slice(start, start + length)
            start += length
            if not row:
                assert all(not bool(out[here].any()) for out in outputs.values()), "padding has outputs"
                continue
            sequence = self.sequences[row]
            parts = {layer: cut(inputs[layer], here) for layer in inputs}
            for layer, own in parts.items():
                whole = join(sequence.inputs[layer], own)
                expected = formula(self.layers[layer], whole).out[len(sequence) :]
                self._near(outputs[layer][here], expected, f"outputs of row {row}, layer {layer}")
            taken = length if accepted is None else accepted[n]
            sequence.extend({layer: cut(own, slice(0, taken)) for layer, own in parts.items()})
        self.check_pool()

    def check_pool(self) -> None:
        """Every slot holds its request's or its snapshot's states, and all others but slot 0 are untouched."""
        held = {self.slot_of[row]: (row, len(sequence)) for row, sequence in self.sequences.items() if len(sequence)}
        held |= self.kept
        for index, layer in enumerate(LINEAR_LAYERS):
            for slot in range(1, NUM_SLOTS + 1):
                window, state = self.cache.conv[0][index, slot], self.cache.temporal[index, slot]
                if slot not in held:
                    assert bool(window.isnan().all()) and bool(state.isnan().all()), f"slot {slot} was written"
                    continue
                row, length = held[slot]
                sequence = cut(self.sequences[row].inputs[layer], slice(0, length))
                expected = formula(self.layers[layer], sequence)
                assert torch.equal(window.double(), expected.window), f"window of row {row} in slot {slot}"
                self._near(state, expected.state, f"state of row {row} after {length} tokens in slot {slot}")

    def _near(self, actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
        error = relative_error(actual, expected)
        assert error <= self.tolerance, f"{what}: relative error {error:.1e}"


class _FullAttention:
    """As much of a full attention backend as the hybrid one asks for."""

    needs_cpu_seq_lens = False
    kv_index_translator = token_to_kv_pool = None
    use_captured_forward_metadata_for_breakable_cuda_graph = False

    def __init__(self, pool: Any) -> None:
        self.req_to_token_pool = pool

    def init_forward_metadata(self, batch: Any) -> None:
        pass

    def init_forward_metadata_out_graph(self, batch: Any, in_capture: bool = False) -> None:
        pass

    def init_forward_metadata_in_graph(self, batch: Any) -> None:
        pass

    def init_cuda_graph_state(self, max_bs: int, max_num_tokens: int) -> None:
        pass


def tracking(slots: Sequence[int], mask: Sequence[bool]) -> dict[str, torch.Tensor]:
    return {
        "mamba_track_indices": torch.tensor(slots, dtype=torch.int64),
        "mamba_track_mask": torch.tensor(mask, dtype=torch.bool),
    }


def _bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)
