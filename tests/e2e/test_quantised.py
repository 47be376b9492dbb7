"""The usual command on a quantised checkpoint: a real server, with drafts and a prefix cache, laid beside the oracle.

The oracle reads the checkpoint through the same core and multiplies it out; that the core reads it rightly, the tests
of `tests/cpu/core/test_packed.py` show. Formats that are not here are compared without a server, in `tests/cpu`.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3next_plugin.demo.random import write_random_checkpoint

from .engine import Setup
from .oracle import LOGPROB_TOLERANCE, golden_prompts, largest_error, random_prompt
from .requests import complete, complete_together
from .server import Server, engine

LENGTHS = (3, 90)
# One start each; together with the other engine's, every tool's packing.
SERVED = {
    "vllm": {"awq": Setup("tiny", 1, "align"), "w4a16": Setup("tiny", eager=False)},
    "sglang": {"gptq": Setup("tiny", 2, "extra_buffer")},
}


@pytest.fixture(scope="module", params=SERVED[engine().name])
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Server, Path, Setup]]:
    kind: str = request.param
    setup = SERVED[engine().name][kind]
    directory = tmp_path_factory.mktemp("quantised") / kind
    checkpoint = write_random_checkpoint(directory, setup.shape, dtype="float32", quantization=kind)
    with Server(checkpoint, *engine().flags(setup), name=kind) as server:
        yield server, checkpoint, setup


def test_answers_and_log_probabilities_are_the_oracles(served: tuple[Server, Path, Setup]) -> None:
    server, checkpoint, setup = served
    golden = golden_prompts(checkpoint, LENGTHS, 30)
    for expected, found in zip(golden, complete_together(server, [g.prompt for g in golden], 30), strict=True):
        assert found.tokens == list(expected.answer), f"after a prompt of {len(expected.prompt)} tokens"
        assert largest_error(checkpoint, expected.prompt, found) < LOGPROB_TOLERANCE
    prompt = random_prompt(7, 200)
    for _ in range(2):
        found = complete(server, prompt, 20)
        assert largest_error(checkpoint, prompt, found) < LOGPROB_TOLERANCE
    assert (found.cached_tokens > 0) == bool(setup.cache)
    drafted, _ = server.acceptance()
    assert (drafted > 0) == (setup.num_drafts > 0)
    assert len(server.activation_lines()) == 1 and "Traceback" not in server.log
