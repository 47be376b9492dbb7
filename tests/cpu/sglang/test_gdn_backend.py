"""Our Gated DeltaNet backend over SGLang's own pool: every step's outputs and all states, against float64."""

import random

import pytest
import torch

from tests.cpu.sglang.gdn_pool import NUM_REQUESTS, Harness, publish


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
