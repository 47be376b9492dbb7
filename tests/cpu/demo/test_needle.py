"""What the demo model remembers of a long conversation, with YaRN and without: measured here, and as committed."""

import json
import random
from collections import Counter
from collections.abc import Sequence

import torch

from benchmarks.needle import (
    CHECKPOINT,
    FACTOR,
    LONGEST_ROW,
    RESULT,
    Needle,
    conversation_with_needles,
    measure,
    with_yarn,
)
from qwen3next_plugin.demo.batches import encode_message
from qwen3next_plugin.demo.corpus import FACTS
from qwen3next_plugin.demo.evaluate import open_demo


def test_every_fact_is_told_once_and_the_length_is_kept() -> None:
    _, encode, _ = open_demo(CHECKPOINT)
    chat, depths = conversation_with_needles(random.Random(0), encode, 2000)
    assert set(depths) == set(chat.facts) == set(FACTS)
    assert max(depths.values()) - min(depths.values()) > 0.4
    tokens = sum(len(encode_message(message, encode)[0]) for message in chat.messages)
    assert 1600 < tokens < 2400


def right_answers(needles: Sequence[Needle]) -> dict[tuple[str, int], int]:
    """By rope and length."""
    return dict(Counter((needle.rope, needle.length) for needle in needles if needle.right))


def test_yarn_is_not_worse_at_four_times_the_longest_training_row() -> None:
    """By one conversation of each length; within the training length the model knows nearly every fact."""
    model, encode, _ = open_demo(CHECKPOINT, torch.float32)
    short, long = LONGEST_ROW, 4 * LONGEST_ROW
    right = right_answers(measure({"none": model, "yarn": with_yarn(model)}, encode, [short, long], 1))
    assert min(right["none", short], right["yarn", short]) >= 5
    assert right["yarn", long] >= right.get(("none", long), 0)


def test_the_committed_figures_say_the_same() -> None:
    """At four times the length that config.json states, as the oracle measured it once."""
    result = json.loads(RESULT.read_text())
    length = FACTOR * result["config_length"]
    right = right_answers([Needle(**needle) for needle in result["needles"]])
    for beyond in (LONGEST_ROW * FACTOR, length):
        assert right[f"yarn:{FACTOR}", beyond] >= right.get(("none", beyond), 0)
    assert right["none", LONGEST_ROW] > 0.8 * len(FACTS) * result["conversations"]
