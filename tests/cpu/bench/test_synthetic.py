"""Synthetic weights: one model for everybody, close to what a real checkpoint holds."""

from typing import Any

import pytest
import torch

from qwen3next_plugin import synthetic
from qwen3next_plugin.bench.oracle import oracle_log_probabilities
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.random import tensor_shapes
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.kernels.gemm.reference import dequantize_block
from qwen3next_plugin.reference import ReferenceModel
from qwen3next_plugin.reference import model as reference_model
from qwen3next_plugin.synthetic import EXPERTS_AT_ONCE, SIGMA, synthetic_tensors
from qwen3next_plugin.weights import SCALE_SUFFIX, fuse_checkpoint

BLOCKS = parse_config(config_of("blocks", fp8=True))
MANY = parse_config(config_of("tiny", num_experts=EXPERTS_AT_ONCE + 6, num_experts_per_tok=4))


def _all(spec, **given):  # type: ignore[no-untyped-def]
    return {name: tensor.clone() for name, tensor in synthetic_tensors(spec, "cpu", **given)}


@pytest.mark.parametrize("spec", [BLOCKS, MANY], ids=["fp8", "experts in two draws"])
def test_they_are_a_whole_checkpoint(spec) -> None:  # type: ignore[no-untyped-def]
    tensors = _all(spec)
    assert {name: tuple(t.shape) for name, t in tensors.items() if not name.endswith(SCALE_SUFFIX)} == dict(
        tensor_shapes(spec)
    )
    fuse_checkpoint(tensors.items(), spec)  # raises for anything missing, unknown or misshapen


def test_a_tensor_depends_on_its_name_and_seed_alone() -> None:
    whole, model, mtp, again = (_all(BLOCKS, scope=scope) for scope in ("all", "model", "mtp", "all"))
    for name, tensor in whole.items():
        assert torch.equal(tensor.view(torch.uint8), again[name].view(torch.uint8))
    for part in (model, mtp):
        assert part
        assert all(
            torch.equal(tensor.view(torch.uint8), whole[name].view(torch.uint8)) for name, tensor in part.items()
        )
    other = _all(BLOCKS, seed=1)
    matrices = [name for name, tensor in whole.items() if tensor.dim() > 1 and not name.endswith(SCALE_SUFFIX)]
    assert not any(torch.equal(other[name].float(), whole[name].float()) for name in matrices)
    seen = {tuple(whole[name].float().flatten()[:8].tolist()) for name in matrices}
    assert len(seen) == len(matrices), "two tensors share their numbers"


@pytest.mark.parametrize("spec", [BLOCKS, MANY], ids=["fp8", "bf16"])
def test_the_default_dtype_changes_nothing(spec) -> None:  # type: ignore[no-untyped-def]
    """Engines load weights with the model's dtype as torch's default; the oracle asks for the same without."""
    expected, before = _all(spec), torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        found = _all(spec)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in expected.items():
        assert found[name].dtype is tensor.dtype, name
        assert torch.equal(found[name].view(torch.uint8), tensor.view(torch.uint8)), name


def test_fp8_weights_are_normal_and_not_zero() -> None:
    tensors = _all(BLOCKS)
    codes = {name: tensor for name, tensor in tensors.items() if tensor.dtype is torch.float8_e4m3fn}
    covered = [n for n, _ in tensor_shapes(BLOCKS) if n.endswith(("_proj.weight", "in_proj_qkvz.weight"))]
    assert sorted(codes) == sorted(covered)
    for name, code in codes.items():
        scale = tensors[name + SCALE_SUFFIX]
        assert scale.dtype is torch.float32
        assert bool((scale > 0).all())
        value = dequantize_block(code, scale)
        writes = name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight"))
        expected = SIGMA / (2 * BLOCKS.num_layers) ** 0.5 if writes else SIGMA
        assert abs(float(value.std()) / expected - 1) < 0.05, name
        assert float((value == 0).float().mean()) < 0.02, f"{name} is mostly zeros"


def test_norms_gates_and_states_begin_like_real_ones() -> None:
    tensors = _all(MANY)
    for name, tensor in tensors.items():
        if name.endswith("linear_attn.norm.weight"):
            assert abs(float(tensor.float().mean()) - 1) < 0.05
        elif tensor.dim() == 1 and "norm" in name:
            assert float(tensor.float().abs().max()) < 0.2, "zero-centred norms stay near zero"
        elif name.endswith("A_log"):
            assert tensor.dtype is torch.float32
            assert bool((tensor.exp() <= 16).all())
        elif name.endswith("dt_bias"):
            step = torch.nn.functional.softplus(tensor)
            assert bool((step > 9e-4).all() and (step < 0.11).all())


def test_routers_spread_the_load_unevenly_and_leave_nobody_idle() -> None:
    torch.manual_seed(0)
    spec = parse_config(
        config_of("tiny", hidden_size=512, num_experts=512, num_experts_per_tok=10, num_hidden_layers=4)
    )
    router = next(t for n, t in synthetic_tensors(spec, "cpu") if n.endswith("mlp.gate.weight"))
    x = torch.nn.functional.rms_norm(torch.randn(20000, 512), (512,))
    load = torch.bincount((x @ router.float().T).topk(10).indices.flatten(), minlength=512).float()
    variation = float(load.std() / load.mean())
    assert 0.3 < variation < 0.55
    assert int(load.min()) > 0
    assert 2 < float(load.max() / load.mean()) < 5


def test_tokens_stay_different_all_the_way_down() -> None:
    """A random deep network can map all tokens to one; then every token would go to the same experts."""
    spec = parse_config(config_of("deep", hidden_size=256, num_experts=64, num_experts_per_tok=4, vocab_size=4096))
    model = ReferenceModel(spec, fuse_checkpoint(synthetic_tensors(spec, "cpu"), spec))
    torch.manual_seed(0)
    tokens = torch.randint(0, 4096, (16, 64))
    with torch.inference_mode():
        last = model.hidden(tokens)[:, -1]
    alike = torch.nn.functional.cosine_similarity(last[:, None], last[None], dim=-1)
    assert float((alike.sum() - 16) / 240) < 0.5


@pytest.mark.parametrize("noise", [0.004, 0.03])
def test_roundings_stay_small_all_the_way_down(noise: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of bfloat16's and FP8's size, in what each layer adds: else logits could not tell right engines from wrong."""
    spec = parse_config(config_of("deep", num_hidden_layers=48, num_experts=64, num_experts_per_tok=8))
    # So narrow a model has products of the published one's size with larger weights only.
    monkeypatch.setattr(synthetic, "SIGMA", SIGMA * (2048 / spec.hidden_size) ** 0.5)
    model = ReferenceModel(spec, fuse_checkpoint(synthetic_tensors(spec, "cpu"), spec))
    torch.manual_seed(0)
    tokens = torch.randint(0, spec.vocab_size, (4, 16))
    exact, random, layer = model.hidden(tokens), torch.Generator().manual_seed(1), reference_model.decoder_layer

    def inexact(x: torch.Tensor, *rest: Any) -> torch.Tensor:
        added = layer(x, *rest) - x
        return x + added * (1 + noise * torch.randn(added.shape, generator=random))

    monkeypatch.setattr(reference_model, "decoder_layer", inexact)
    rounded = model.hidden(tokens)
    error = float((rounded - exact).norm() / exact.norm())
    assert 0 < error < max(3 * noise, 0.02)


def test_the_layer_by_layer_oracle_is_the_oracle() -> None:
    prompts = [[(5 * i + j * j) % 300 for j in range(40)] for i in range(2)]
    with torch.inference_mode():
        streamed = oracle_log_probabilities(BLOCKS, prompts, torch.device("cpu"))
        model = ReferenceModel(BLOCKS, fuse_checkpoint(synthetic_tensors(BLOCKS, "cpu"), BLOCKS))
        whole = model(torch.tensor(prompts))[:, -1].log_softmax(-1)
    assert float((streamed - whole).abs().max()) < 1e-4
