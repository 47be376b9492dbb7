"""The oracle against transformers' own Qwen3-Next: the same random checkpoint read by both."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3NextForCausalLM

from qwen3next_plugin.demo import write_random_checkpoint
from qwen3next_plugin.reference import ReferenceCache, ReferenceModel
from qwen3next_plugin.weights import fuse_checkpoint
from tests.helpers import relative_error

LENGTHS = (1, 3, 64, 65, 150)  # around the chunk of 64 and the convolution's width


@pytest.fixture(scope="module", params=["ratio1", "ratio2", "ratio4", "dense"])
def models(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[ReferenceModel, torch.nn.Module]:
    directory = write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), request.param, seed=7, dtype="float32")
    theirs = Qwen3NextForCausalLM.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager").eval()
    return ReferenceModel.from_checkpoint(directory), theirs


def prompt_of(model: ReferenceModel, length: int) -> list[int]:
    return torch.randint(0, model.spec.vocab_size, (length,), generator=torch.Generator().manual_seed(length)).tolist()


@torch.no_grad()
def test_ragged_prompts_give_the_same_logits(models: tuple[ReferenceModel, torch.nn.Module]) -> None:
    ours, theirs = models
    prompts = [prompt_of(ours, length) for length in LENGTHS]
    for prompt, logits in zip(prompts, ours.ragged(prompts), strict=True):
        expected = theirs(torch.tensor([prompt])).logits[0]
        assert expected.std() > 0.5, "logits this flat would hide errors"
        assert relative_error(logits, expected.double()) < 1e-4


@torch.no_grad()
@pytest.mark.parametrize("first", [1, 2, 70])
def test_continuation_from_a_cache_gives_the_same_logits(
    models: tuple[ReferenceModel, torch.nn.Module], first: int
) -> None:
    ours, theirs = models
    prompt = prompt_of(ours, 90)
    pieces = [prompt[:first], prompt[first : first + 1], prompt[first + 1 : first + 3], prompt[first + 3 :]]
    whole = theirs(torch.tensor([prompt])).logits[0].double()
    cache, past, at = ReferenceCache(), None, 0
    for piece in pieces:
        mine = ours.ragged([piece], [cache])[0]
        output = theirs(torch.tensor([piece]), past_key_values=past, use_cache=True)
        past = output.past_key_values
        assert relative_error(mine, whole[at : at + len(piece)]) < 1e-4
        if len(piece) == 1:  # what transformers itself continues right
            assert relative_error(mine, output.logits[0].double()) < 1e-4
        at += len(piece)
    assert cache.length == len(prompt)


@torch.no_grad()
def test_yarn_gives_the_same_logits(tmp_path: Path) -> None:
    yarn = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}
    write_random_checkpoint(tmp_path, "ratio2", dtype="float32", rope_scaling=yarn, rope_theta=10_000.0)
    theirs = Qwen3NextForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation="eager").eval()
    ours = ReferenceModel.from_checkpoint(tmp_path)
    tokens = torch.tensor([prompt_of(ours, 150)])
    expected = theirs(tokens).logits.double()
    assert relative_error(ours(tokens), expected) < 1e-4
    plain = ReferenceModel(replace(ours.spec, rope=replace(ours.spec.rope, rope_type="default")), ours.weights)
    assert relative_error(plain(tokens), expected) > 1e-2, "YaRN would change nothing here"


@torch.no_grad()
def test_reads_stacked_experts_as_transformers_5_holds_them(models: tuple[ReferenceModel, torch.nn.Module]) -> None:
    ours, theirs = models
    spec = replace(ours.spec, num_mtp_layers=0)  # transformers leaves the MTP layer out
    again = ReferenceModel(spec, fuse_checkpoint(theirs.state_dict().items(), spec))
    prompt = torch.tensor([prompt_of(ours, 20)])
    assert torch.equal(ours(prompt), again(prompt))
