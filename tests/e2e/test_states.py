"""What the engine keeps between steps, compared as tensors: every state in its prefix cache against the oracle's.

Tokens alone can hide a wrong state. Random weights, and drafts that the model accepts and rejects in every mixture,
leave it nowhere to hide.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from tests.helpers import relative_error

from .engine import Setup
from .inside import Ask, Job, Result, run_inside
from .oracle import Golden, golden_prompts, oracle_states, random_prompt
from .server import engine, parameters

STATE_TOLERANCE = 1e-4
"""Relative error of a float32 state against float64."""


def asks(golden: Sequence[Golden]) -> list[Ask]:
    return [Ask(list(g.prompt), len(g.answer), list(g.answer)) for g in golden]


def assert_answers(result: Result, *rounds: Sequence[Golden]) -> None:
    for tokens, golden in zip(result.tokens, rounds, strict=True):
        for found, expected in zip(tokens, golden, strict=True):
            assert found == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"


def assert_cached_states(result: Result, checkpoint: Path, at_least: int) -> None:
    assert len(result.states) >= at_least, [len(state.tokens) for state in result.states]
    for found in result.states:
        assert len(found.tokens) % result.block_size == 0
        expected = oracle_states(checkpoint, found.tokens)
        assert set(found.ssm) == set(expected)
        for name, state in expected.items():
            assert state.ssm is not None and state.conv is not None
            where = f"{name} after {len(found.tokens)} tokens"
            history = found.conv[name][: state.conv.shape[1]]
            assert relative_error(found.ssm[name], state.ssm[0]) < STATE_TOLERANCE, where
            assert relative_error(history, state.conv[0]) < STATE_TOLERANCE, where


@pytest.mark.parametrize("setup", parameters(engine().state_setups))
def test_cached_states_are_the_oracles(random_checkpoint: Callable[[str], Path], setup: Setup) -> None:
    """Four conversations at once, then a second turn of each, which starts from cached states."""
    checkpoint = random_checkpoint(setup.shape)
    first = golden_prompts(checkpoint, (150, 70, 33, 5), 90)
    turns = tuple((*g.prompt, *g.answer, *random_prompt(i, 20)) for i, g in enumerate(first))
    second = [g for turn in turns for g in golden_prompts(checkpoint, (turn,), 40)]
    result = run_inside(Job(str(checkpoint), engine().inside(setup), [asks(first), asks(second)]))
    assert_answers(result, first, second)
    assert result.cached[0] == [0, 0, 0, 0]
    assert max(result.cached[1]) > 0
    if setup.num_drafts:
        every_number = set(range(1, setup.num_drafts + 2))
        assert set(result.accepted) == every_number, "not every number of drafts was accepted"
        assert not result.step_lengths or set(result.step_lengths) == every_number, "nor scheduled"
    assert_cached_states(result, checkpoint, at_least=4)


@pytest.mark.parametrize("num_drafts", [0, pytest.param(2, marks=pytest.mark.quick)])
def test_preempted_requests_resume_rightly(random_checkpoint: Callable[[str], Path], num_drafts: int) -> None:
    """A cache that cannot hold four conversations: some are thrown out and computed again."""
    checkpoint = random_checkpoint("ratio2")
    golden = golden_prompts(checkpoint, (150, 120, 90, 60), 90)
    setup = Setup("ratio2", num_drafts, engine().cache)
    result = run_inside(Job(str(checkpoint), engine().inside(setup, tight=True), [asks(golden)]))
    assert result.preemptions > 0
    assert_answers(result, golden)
    # With drafts a state that outlives the crowd is luck; what is left has to be right all the same.
    assert_cached_states(result, checkpoint, at_least=0 if num_drafts else 1)


@pytest.mark.parametrize(("num_drafts", "cache"), [(2, False), (3, True)], ids=["uncached", "cached"])
def test_up_to_the_last_position(random_checkpoint: Callable[[str], Path], num_drafts: int, cache: bool) -> None:
    """Prompt and answer fill the context exactly: the last steps have room for fewer drafts than configured, then
    for none."""
    checkpoint = random_checkpoint("ratio2")
    golden = golden_prompts(checkpoint, (70, 65, 43), 50)
    filling = [Golden(g.prompt, g.answer[: 100 - len(g.prompt)]) for g in golden]
    setup = Setup(
        "ratio2", num_drafts, engine().cache * cache, max_model_len=100 + engine().context_reserve(num_drafts)
    )
    job = Job(str(checkpoint), engine().inside(setup), [asks(filling), asks(filling)], draft_fault_rate=0.0)
    result = run_inside(job)
    assert [len(g.prompt) + len(g.answer) for g in filling] == [100, 100, 93]
    assert_answers(result, filling, filling)
    assert not result.step_lengths or set(result.step_lengths) >= {1, num_drafts + 1}
    if cache:
        assert_cached_states(result, checkpoint, at_least=1)


@pytest.mark.skipif(engine().name != "vllm", reason="SGLang runs every running request in every step")
def test_a_request_left_out_of_a_step_keeps_its_state(random_checkpoint: Callable[[str], Path]) -> None:
    """More decoding requests than a step has tokens for: those left out go on from their last accepted token."""
    checkpoint = random_checkpoint("ratio2")
    golden = golden_prompts(checkpoint, (2, 3, 2, 2), 60)
    arguments = engine().inside(Setup("ratio2", 3, engine().cache)) | {"max_num_batched_tokens": 10}
    result = run_inside(Job(str(checkpoint), arguments, [asks(golden)]))
    assert result.skipped_steps > 0
    assert_answers(result, golden)


def test_a_config_that_does_not_mention_its_mtp_layer(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """As the published config.json: no num_nextn_predict_layers, though the checkpoint has the layer."""
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(random_checkpoint("ratio2"), checkpoint)
    config = json.loads((checkpoint / "config.json").read_text())
    del config["num_nextn_predict_layers"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    golden = golden_prompts(checkpoint, (40, 7), 20)
    result = run_inside(Job(str(checkpoint), engine().inside(Setup("ratio2", 2, engine().cache)), [asks(golden)]))
    assert_answers(result, golden)
    assert max(result.accepted) > 1
