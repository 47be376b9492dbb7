"""The MTP head against a computation of its own, and drafting."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextDecoderLayer, Qwen3NextRotaryEmbedding

from qwen3next_plugin.demo import write_random_checkpoint
from qwen3next_plugin.demo.drafting import draft_hidden
from qwen3next_plugin.reference import ReferenceCache, ReferenceModel, accept_drafts, generate_greedy
from tests.helpers import relative_error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "ratio2", seed=11, dtype="float32")


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> ReferenceModel:
    return ReferenceModel.from_checkpoint(checkpoint, torch.float64)


def tokens_of(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(length))


def zero_centred(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * (1 + weight)


@torch.no_grad()
def test_mtp_layer_against_transformers_decoder_layer(checkpoint: Path, model: ReferenceModel) -> None:
    """transformers has no MTP head, but its full-attention layer is the same: only what surrounds it is written out
    here."""
    stored = load_file(checkpoint / "model.safetensors")
    raw = {name: w.double() for name, w in stored.items() if name.startswith("mtp.")}
    config = AutoConfig.from_pretrained(checkpoint)
    config._attn_implementation = "eager"
    layer = Qwen3NextDecoderLayer(config, layer_idx=3).double().eval()
    own = layer.state_dict()
    state = {n.removeprefix("mtp.layers.0."): w for n, w in raw.items() if n.startswith("mtp.layers.0.")}
    parts = [[state.pop(f"mlp.experts.{e}.{p}_proj.weight") for e in range(8)] for p in ("gate", "up", "down")]
    state["mlp.experts.gate_up_proj"] = torch.cat([torch.stack(parts[0]), torch.stack(parts[1])], dim=1)
    state["mlp.experts.down_proj"] = torch.stack(parts[2])
    assert state.keys() == own.keys()
    layer.load_state_dict(state)

    length = 50
    hidden, following = torch.randn(1, length, 64, dtype=torch.float64), tokens_of(length)
    embedding = functional.embedding(following, model.weights["model.embed_tokens.weight"])
    both = [
        zero_centred(embedding, raw["mtp.pre_fc_norm_embedding.weight"]),
        zero_centred(hidden, raw["mtp.pre_fc_norm_hidden.weight"]),
    ]
    x = torch.cat(both, dim=-1) @ raw["mtp.fc.weight"].T
    positions = torch.arange(length)[None]
    mask = torch.full((length, length), float("-inf"), dtype=torch.float64).triu(1)[None, None]
    rotary = Qwen3NextRotaryEmbedding(config)(x, positions)
    expected = zero_centred(layer(x, position_embeddings=rotary, attention_mask=mask), raw["mtp.norm.weight"])
    # transformers keeps routing weights and rotary tables in float32
    assert relative_error(model.mtp(hidden, following), expected) < 1e-6


@torch.no_grad()
def test_mtp_continues_from_its_cache(model: ReferenceModel) -> None:
    hidden, following, cache = torch.randn(2, 20, 64, dtype=torch.float64), tokens_of(20, batch=2), ReferenceCache()
    pieces = [model.mtp(hidden[:, a:b], following[:, a:b], cache) for a, b in ((0, 7), (7, 8), (8, 20))]
    assert cache.mtp_length == 20 and cache.length == 0
    assert relative_error(torch.cat(pieces, dim=1), model.mtp(hidden, following)) < 1e-12


@torch.no_grad()
def test_training_sees_what_drafting_computes(model: ReferenceModel) -> None:
    """All starts at once, as in training, equal drafting from each start with a cache of its own."""
    length, depth = 12, 3
    tokens = tokens_of(length + depth + 1)
    hidden = model.hidden(tokens[:, :length])
    steps = draft_hidden(model, hidden, tokens, depth)
    for start in range(length):
        cache = ReferenceCache()
        result = model.mtp(hidden[:, : start + 1], tokens[:, 1 : start + 2], cache)[:, -1:]
        for d, step in enumerate(steps):
            if d > 0:
                following = tokens[:, start + d + 1 : start + d + 2]
                result = model.mtp(result, following, cache)
            assert relative_error(step[:, start], result[:, 0]) < 1e-12, (start, d)


@torch.no_grad()
def test_rows_left_out_do_not_change_the_others(model: ReferenceModel) -> None:
    tokens = tokens_of(20)
    hidden = model.hidden(tokens[:, :16])
    wanted = torch.arange(16)[None] % 3 == 0
    for all_rows, some in zip(
        draft_hidden(model, hidden, tokens, 2), draft_hidden(model, hidden, tokens, 2, wanted), strict=True
    ):
        assert relative_error(some[wanted], all_rows[wanted]) < 1e-12


def test_greedy_decoding_and_its_margins(model: ReferenceModel) -> None:
    prompts = [tokens_of(n)[0].tolist() for n in (1, 9, 70)]
    for prompt, answer in zip(prompts, generate_greedy(model, prompts, 8), strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer.tokens]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == answer.tokens
        best = logits.topk(2).values
        assert torch.allclose(best[:, 0] - best[:, 1], torch.tensor(answer.margins, dtype=torch.float64), atol=1e-9)
        assert answer.smallest_margin == min(answer.margins) > 0


def test_greedy_decoding_stops_at_a_stop_token(model: ReferenceModel) -> None:
    prompt = tokens_of(5)[0].tolist()
    free = generate_greedy(model, [prompt], 6)[0].tokens
    stopped = generate_greedy(model, [prompt], 6, stop_tokens=[free[2]])[0].tokens
    assert stopped == free[: free.index(free[2]) + 1]


def test_an_empty_prompt_is_refused(model: ReferenceModel) -> None:
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_greedy(model, [[]], 1)


def test_replayed_drafts_equal_drafting_step_by_step(model: ReferenceModel) -> None:
    """A head that is right by construction would hide errors: here the answer is what the random head itself drafts."""
    prompt, depth = tokens_of(10)[0].tolist(), 3
    answer = list(tokens_of(4)[0].tolist())
    with torch.no_grad():  # append three tokens as drafted behind prompt + answer[:1]
        cache = ReferenceCache()
        known = torch.tensor([prompt + answer[:1]])
        result = model.mtp(model.hidden(known[:, :-1]), known[:, 1:], cache)[:, -1:]
        drafted = []
        for _ in range(depth):
            drafted.append(int(model.logits(result).argmax()))
            result = model.mtp(result, torch.tensor([[drafted[-1]]]), cache)
    accepted = accept_drafts(model, prompt, [answer[0], *drafted, 0], depth)
    assert accepted.accepted[:3] == [1, 1, 1] and accepted.drafted == [1, 1, 1]
    assert accepted.acceptance_rate == 1.0 and accepted.acceptance_length == 4.0

    wrong = [answer[0], drafted[0], (drafted[1] + 1) % 320, drafted[2], 0]
    first = accept_drafts(model, prompt, wrong[:4], depth)
    # The second draft is wrong, so the third counts as rejected, and decoding goes on behind the correction.
    assert first.drafted[0] >= 1 and first.accepted[0] >= 1
    assert first.accepted[1] == 0


def test_the_config_says_that_there_is_an_mtp_layer(checkpoint: Path) -> None:
    assert json.loads((checkpoint / "config.json").read_text())["num_nextn_predict_layers"] == 1
