"""Our Gated DeltaNet backend over SGLang's own pool: every step's outputs and all states, against float64."""

import random
from types import SimpleNamespace
from typing import Any

import pytest
import sglang.srt.layers.attention.linear.gdn_backend  # noqa: F401  (the class that is looked for)
import torch
from sglang.srt.model_executor.forward_batch_info import ForwardMode

from qwen3next_plugin.errors import RegistrationError
from qwen3next_plugin.sglang_integration import gdn_backend
from tests.cpu.sglang.gdn_pool import NUM_REQUESTS, Harness, publish, tracking
from tests.cpu.sglang.gdn_sequences import Inputs


@pytest.fixture(autouse=True)
def _published() -> None:
    publish()


def test_prompt_in_chunks_then_decode() -> None:
    harness = Harness()
    harness.extend([1, 2], [70, 3])
    harness.extend([2, 1, 3], [64, 1, 2])
    for _ in range(3):
        harness.decode([1, 3, 2])


def test_padding_rows_leave_everything_alone() -> None:
    harness = Harness()
    harness.extend([1, 0, 2], [5, 4, 6])
    harness.decode([2, 1, 0, 0])


def test_an_idle_step() -> None:
    harness = Harness()
    harness.decode([])
    harness.check_pool()


def test_snapshots_where_a_chunk_of_the_prompt_ends() -> None:
    harness = Harness()
    harness.extend([1, 2, 3], [130, 64, 40], keep={1: (3, 128), 2: (5, 64)})
    harness.extend([1, 2], [200, 65], keep={1: (7, 64)})  # within the chunk: a junction of the radix tree
    harness.decode([1, 2, 3])


def test_snapshots_after_decode() -> None:
    harness = Harness()
    harness.extend([1, 2], [5, 6])
    harness.decode([1, 2], keep={2: 3})
    harness.decode([2, 1], keep={2: 5, 1: 7})
    harness.decode([1, 2])


@pytest.mark.parametrize("num_drafts", [1, 2, 3])
def test_verification_keeps_what_was_accepted(num_drafts: int) -> None:
    harness = Harness(num_drafts=num_drafts)
    harness.extend([1, 2, 3], [6, 2, 9])
    for accepted in range(1, num_drafts + 2):
        harness.verify([3, 1, 2], [accepted, 1, num_drafts + 1])
    harness.verify([1, 0], [2, 1])
    harness.extend([2, 4], [66, 3])


def test_snapshots_after_verification() -> None:
    harness = Harness(num_drafts=3)
    harness.extend([1, 2], [6, 2])
    harness.verify([1, 2], [3, 4], keep={1: (3, 1), 2: (5, 3)})
    harness.verify([2, 1], [1, 2])


@pytest.mark.parametrize("ssm_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("seed", range(4))
def test_any_sequence_of_steps(seed: int, ssm_dtype: torch.dtype, proof: bool) -> None:
    dice = random.Random(seed)
    harness = Harness(num_drafts=dice.choice([1, 2, 3]), ssm_dtype=ssm_dtype)
    for _ in range(60 if proof else 10):
        rows = dice.sample(range(1, NUM_REQUESTS + 1), dice.randint(1, NUM_REQUESTS))
        begun = [row for row in rows if len(harness.sequences[row])]
        spare = list(range(1, 15, 2))
        dice.shuffle(spare)
        padding = [0] * dice.randint(0, 1)
        step = dice.choice(["extend", "decode", "verify"]) if begun else "extend"
        if step == "extend":
            lengths = [dice.choice([1, 1, 2, 63, 64, 65, 130]) for _ in rows]
            keep = {
                row: (spare.pop(), 64 * dice.randint(1, length // 64))
                for row, length in zip(rows, lengths, strict=True)
                if length >= 64 and dice.random() < 0.7
            }
            harness.extend([*rows, *padding], lengths + [2] * len(padding), keep)
        elif step == "decode":
            harness.decode(begun + padding, {row: spare.pop() for row in begun if dice.random() < 0.4})
        else:
            accepted = [dice.randint(1, harness.num_tokens) for _ in begun]
            keep = {
                row: (spare.pop(), dice.randrange(count))
                for row, count in zip(begun, accepted, strict=True)
                if dice.random() < 0.4
            }
            harness.verify(begun + padding, accepted + [1] * len(padding), keep)


def replay(harness: Harness, batch: Any, rows: list[int], inputs: dict[int, Inputs]) -> dict[int, torch.Tensor]:
    """What a replay does: refresh the buffers with `rows` and padding, then run what was captured on `batch`."""
    captured = harness.backend.forward_metadata
    size = batch.batch_size
    batch.req_pool_indices.copy_(torch.tensor(rows + [0] * (size - len(rows))))
    view = SimpleNamespace(
        batch_size=size,
        forward_mode=batch.forward_mode,
        req_pool_indices=batch.req_pool_indices,
        seq_lens_cpu=None,
        spec_info=batch.spec_info,
        num_padding=size - len(rows),
        mamba_track_indices=batch.mamba_track_indices,
    )
    harness.hybrid.init_forward_metadata_out_graph(view)
    of_the_replay, harness.backend.forward_metadata = harness.backend.forward_metadata, captured
    harness.hybrid.init_forward_metadata_in_graph(batch)
    outputs = harness.forward(batch, inputs)
    harness.backend.forward_metadata = of_the_replay
    return outputs


def test_decode_replays_with_other_rows_padding_and_snapshots() -> None:
    harness = Harness()
    harness.extend([1, 2, 3], [5, 6, 7])
    harness.backend.init_cuda_graph_state(4, 4)
    batch = harness.batch(ForwardMode.DECODE, [0, 0, 0], [1] * 3, **tracking([0] * 3, [False] * 3))
    harness.hybrid.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = harness.backend.forward_metadata
    for rows, keep in (([3, 1], {1: 5}), ([2, 3, 1], {}), ([2], {2: 7})):
        assert batch.mamba_track_indices is not None and batch.mamba_track_mask is not None
        for n in range(3):
            batch.mamba_track_mask[n] = n < len(rows) and rows[n] in keep
            batch.mamba_track_indices[n] = keep.get(rows[n], 0) if n < len(rows) else 0
        inputs = harness.draw(3)
        harness.backend.forward_metadata = captured
        outputs = replay(harness, batch, rows, inputs)
        harness.kept |= {slot: (row, len(harness.sequences[row]) + 1) for row, slot in keep.items()}
        harness.settle(rows + [0] * (3 - len(rows)), [1] * 3, inputs, outputs)


def test_verification_replays_with_other_rows_and_padding() -> None:
    harness = Harness(num_drafts=2)
    harness.extend([1, 2, 3], [5, 6, 7])
    harness.backend.init_cuda_graph_state(4, 12)
    batch = harness.verify_batch([0, 0, 0])
    harness.hybrid.init_forward_metadata_out_graph(batch, in_capture=True)
    captured = harness.backend.forward_metadata
    for rows, accepted in (([3, 1], [2, 3]), ([2, 3, 1], [1, 3, 2]), ([1], [2])):
        inputs = harness.draw(9)
        harness.backend.forward_metadata = captured
        outputs = replay(harness, batch, rows, inputs)
        harness.commit(rows + [0] * (3 - len(rows)), accepted + [1] * (3 - len(rows)), inputs, outputs, {})


def test_a_tree_of_drafts_is_refused() -> None:
    with pytest.raises(RegistrationError, match="--speculative-eagle-topk is 2.*set it to 1"):
        Harness(num_drafts=2, topk=2)


def test_sglangs_ring_of_states_is_refused() -> None:
    with pytest.raises(RegistrationError, match="--enable-linear-replayssm"):
        Harness(enable_linear_replayssm=True)


def test_chunks_that_no_snapshot_fits_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gdn_backend, "mamba_cache_chunk_size", lambda: 32)
    with pytest.raises(RegistrationError, match="every 32 tokens.*--page-size"):
        Harness()


@pytest.mark.parametrize(
    ("model_type", "backend"), [("qwen3_next", "Qwen3NextGdnBackend"), ("qwen3_5_moe", "GDNAttnBackend")]
)
def test_other_models_keep_sglangs_backend(model_type: str, backend: str) -> None:
    runner = Harness().runner
    runner.model_config = SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type))
    triton = SimpleNamespace(is_triton=lambda: True, is_flashinfer=lambda: False)
    runner.linear_attn_backends = SimpleNamespace(decode=triton, prefill=triton, verify=triton)
    assert type(gdn_backend.make_gdn_backend(runner)).__name__ == backend
