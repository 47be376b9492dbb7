"""The oracle against itself: chunked against recurrent, float32 against float64, one call against many."""

from pathlib import Path

import pytest
import torch

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo import write_random_checkpoint
from qwen3next_plugin.reference import ReferenceCache, ReferenceModel
from qwen3next_plugin.weights import fuse_checkpoint, open_checkpoint
from tests.helpers import relative_error


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_random_checkpoint(tmp_path_factory.mktemp("checkpoint"), "ratio4", seed=3, dtype="float32")


def model_of(checkpoint: Path, dtype: torch.dtype, delta_rule: str = "auto") -> ReferenceModel:
    spec = load_spec(checkpoint)
    return ReferenceModel(spec, fuse_checkpoint(open_checkpoint(checkpoint), spec), dtype, delta_rule)


def tokens_of(length: int, batch: int = 1) -> torch.Tensor:
    return torch.randint(0, 320, (batch, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("length", [1, 63, 64, 65, 200])
def test_chunked_recurrent_and_float64_agree(checkpoint: Path, length: int) -> None:
    tokens = tokens_of(length)
    truth = model_of(checkpoint, torch.float64, "recurrent")(tokens)
    assert truth.dtype is torch.float64
    assert relative_error(model_of(checkpoint, torch.float64, "chunked")(tokens), truth) < 1e-12
    assert relative_error(model_of(checkpoint, torch.float32, "recurrent")(tokens), truth) < 1e-5
    assert relative_error(model_of(checkpoint, torch.float32, "chunked")(tokens), truth) < 1e-5


@torch.no_grad()
def test_bfloat16_stays_close(checkpoint: Path) -> None:
    tokens = tokens_of(100)
    logits = model_of(checkpoint, torch.bfloat16)(tokens)
    assert logits.dtype is torch.bfloat16
    # Roundings of 2^-9 each, and now and then another expert; a wrong formula would be off by more than 1.
    assert relative_error(logits, model_of(checkpoint, torch.float64)(tokens)) < 0.25


@torch.no_grad()
def test_token_by_token_equals_one_call(checkpoint: Path) -> None:
    model, tokens = model_of(checkpoint, torch.float64), tokens_of(70, batch=2)
    cache = ReferenceCache()
    steps = [model(tokens[:, :33], cache)] + [model(tokens[:, t : t + 1], cache) for t in range(33, 70)]
    assert relative_error(torch.cat(steps, dim=1), model(tokens)) < 1e-12


@torch.no_grad()
def test_a_copied_cache_is_a_snapshot(checkpoint: Path) -> None:
    model, tokens = model_of(checkpoint, torch.float64), tokens_of(40)
    cache = ReferenceCache()
    model(tokens[:, :30], cache)
    snapshot = cache.copy()
    first = model(tokens[:, 30:], cache)
    assert snapshot.length == 30 and cache.length == 40
    assert torch.equal(first, model(tokens[:, 30:], snapshot))


def test_every_weight_gets_a_gradient(checkpoint: Path) -> None:
    spec = load_spec(checkpoint)
    weights = {n: w.requires_grad_() for n, w in fuse_checkpoint(open_checkpoint(checkpoint), spec).items()}
    model, tokens = ReferenceModel(spec, weights), tokens_of(130, batch=4)
    hidden = model.hidden(tokens[:, :-1])
    states = torch.cat([hidden, model.mtp(hidden, tokens[:, 1:])])
    model.logits(states).logsumexp(-1).mean().backward()
    for name, weight in weights.items():
        assert weight.grad is not None and bool(torch.isfinite(weight.grad).all()), name
        assert float(weight.grad.abs().sum()) > 0, f"{name} has no influence"


@torch.no_grad()
def test_fp8_blocks_are_multiplied_out(tmp_path: Path) -> None:
    plain = ReferenceModel.from_checkpoint(write_random_checkpoint(tmp_path / "a", "blocks", dtype="float32"))
    quantised = write_random_checkpoint(tmp_path / "b", "blocks", dtype="float32", fp8=True)
    blocks = ReferenceModel.from_checkpoint(quantised)
    name = "model.layers.0.linear_attn.in_proj_qkvz.weight"
    error = relative_error(blocks.weights[name], plain.weights[name].double())
    assert 0.005 < error < 0.04  # three bits of mantissa: 2^-4 at most, less on average
    assert torch.equal(blocks.weights["lm_head.weight"], plain.weights["lm_head.weight"])
    assert not [name for name in blocks.weights if name.endswith("_scale_inv")]
