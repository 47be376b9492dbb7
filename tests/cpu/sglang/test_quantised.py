"""Checkpoints in packed integers, built and loaded by SGLang's own loader, against the oracle that reads them too."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.model_config import ModelConfig
from torch.nn import functional

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.kernels.gemm.integer import dequantize_int8, quantize_int8_tokens
from qwen3next_plugin.kernels.moe.reference import swiglu
from qwen3next_plugin.layers_integer import IntegerExperts, IntegerLinear
from qwen3next_plugin.quantization import NAME, check_asked
from qwen3next_plugin.reference import ReferenceModel, layers
from qwen3next_plugin.reference import model as reference_model
from qwen3next_plugin.sglang_integration import checks, quantization
from qwen3next_plugin.weights import fuse_checkpoint, open_checkpoint
from tests.helpers import relative_error

from .in_process import load, model_config, run, start

SEQUENCES = [[5, 6, 7, 8, 9], [1], list(range(90))]
# float32 against float64; a value on the edge of two INT8 codes may go either way.
TOLERANCES = {"awq": 1e-5, "gptq": 1e-5, "gptq-int8": 1e-5, "w4a16": 1e-5, "w8a16": 1e-5, "w8a8": 1e-2}


@pytest.fixture(autouse=True)
def method_of_our_own(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """SGLang is told of the method, as the plugin does when a server starts."""
    original: Callable[[ModelConfig], None] = ModelConfig._verify_quantization
    quantization.register()
    monkeypatch.setattr(ModelConfig, "_verify_quantization", lambda self: checks.verify_quantization(original, self))
    yield


def round_activations(monkeypatch: pytest.MonkeyPatch, path: Path, oracle: ReferenceModel) -> None:
    """Let the oracle round what meets a weight that the checkpoint holds in INT8, a token at a time."""
    stored = fuse_checkpoint(open_checkpoint(path), oracle.spec)
    quantised = {id(oracle.weights[name]) for name, tensor in stored.items() if tensor.dtype == torch.int8}

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return dequantize_int8(*quantize_int8_tokens(x), torch.float64)

    def linear(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return functional.linear(rounded(x) if id(weight) in quantised else x, weight)

    def experts(
        x: torch.Tensor, w13: torch.Tensor, w2: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(x)
        for token, row in enumerate(rounded(x)):
            for weight, expert in zip(weights[token], ids[token].tolist(), strict=True):
                out[token] += weight * functional.linear(rounded(swiglu(row @ w13[expert].T)), w2[expert])
        return out

    for module in (layers, reference_model):
        monkeypatch.setattr(module, "functional", SimpleNamespace(linear=linear, embedding=functional.embedding))
    monkeypatch.setattr(layers, "fused_moe", experts)


@pytest.mark.parametrize("kind", TOLERANCES)
def test_target_and_drafter_say_what_the_oracle_says(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_random_checkpoint(tmp_path / "it", "tiny", dtype="float32", quantization=kind)
    start(path, meeting=tmp_path / "meeting")
    assert model_config(path).quantization == NAME
    target, drafter = load(path), load(path, drafter=True)
    drafter.set_embed_and_head(*target.get_embed_and_head())
    kinds = [type(module) for module in target.modules()]
    assert kinds.count(IntegerExperts) == 4 and kinds.count(IntegerLinear) >= 8
    oracle = ReferenceModel.from_checkpoint(path, torch.float64)
    if kind == "w8a8":
        round_activations(monkeypatch, path, oracle)
    hidden = run(target, SEQUENCES)
    for x, sequence in zip(hidden, SEQUENCES, strict=True):
        assert relative_error(x, oracle.hidden(oracle.tokens(sequence))[0]) < TOLERANCES[kind]
    logits = hidden[0] @ target.lm_head.weight[: target.spec.vocab_size].T
    assert relative_error(logits, oracle(oracle.tokens(SEQUENCES[0]))[0]) < TOLERANCES[kind]
    following = [[*sequence[1:], 11] for sequence in SEQUENCES]
    for x, sequence, after in zip(run(drafter, following, torch.cat(hidden)), SEQUENCES, following, strict=True):
        expected = oracle.mtp(oracle.hidden(oracle.tokens(sequence)), oracle.tokens(after))[0]
        assert relative_error(x, expected) < TOLERANCES[kind]


@pytest.mark.parametrize("asked", [None, "awq", "awq_marlin", "moe_wna16"])
def test_the_checkpoints_method_by_any_of_its_names_is_ours(asked: str | None, tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path / "it", "tiny", quantization="awq")
    arguments: dict[str, Any] = {} if asked is None else {"quantization": asked}
    start(path, meeting=tmp_path / "meeting", **arguments)
    assert model_config(path).quantization == NAME


def test_another_method_than_the_checkpoints_is_refused(tmp_path: Path) -> None:
    spec = load_spec(write_random_checkpoint(tmp_path / "it", "tiny", quantization="awq", weights=False))
    with pytest.raises(ConfigError, match=r"--quantization is bitsandbytes: the checkpoint is awq.*drop it"):
        check_asked(spec, "bitsandbytes")
    check_asked(spec, NAME)
    check_asked(replace(spec, quant=None), None)
