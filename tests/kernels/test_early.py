"""Launches begun early, in the order a layer has them, leave the bits that they leave one after the other."""

from typing import Any

import pytest
import torch

from qwen3next_plugin.kernels import early, gemm, moe
from qwen3next_plugin.kernels.gdn.triton_decode import gdn_decode_fused
from qwen3next_plugin.kernels.moe import ways

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("poisoned_memory")]
LAYERS, HIDDEN, CONV, VALUE, EXPERTS, INNER = 4, 2048, 8192, 4096, 64, 512


def layer(rows: int) -> dict[str, Any]:
    """Weights and states of a Gated DeltaNet layer with experts, on one rank."""

    def normal(*shape: int, scale: float = 0.02, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    float32 = {"dtype": torch.float32}
    return {
        "norms": [normal(HIDDEN), normal(HIDDEN)],
        "in_proj": (*gemm.quantize_block(normal(CONV + VALUE, HIDDEN)), normal(64, HIDDEN), None),
        "gates": (normal(32, **float32), normal(32, **float32)),
        "core": (normal(CONV, 4), normal(128)),
        "states": (normal(rows + 1, CONV, 3), normal(rows + 1, 32, 128, 128, **float32)),
        "out_proj": gemm.quantize_block(normal(HIDDEN, VALUE)),
        "router": normal(EXPERTS, HIDDEN),
        "experts": (normal(EXPERTS, 2 * INNER, HIDDEN), normal(EXPERTS, HIDDEN, INNER)),
    }


def step(layers: list[dict[str, Any]], x: torch.Tensor) -> torch.Tensor:
    rows = len(x)
    starts = torch.arange(rows + 1, device="cuda", dtype=torch.int32)
    residual = x
    for one in layers:
        qkvz, ba, residual = gemm.few_matmul_of_norm(x, residual, one["norms"][0], 1e-6, *one["in_proj"])
        core = torch.empty(rows, 32, 128, device="cuda", dtype=x.dtype)
        inputs = (qkvz[:, :CONV], qkvz[:, CONV:].unflatten(1, (32, 128)), (ba[:, 32:], ba[:, :32], *one["gates"]))
        places = (starts[:-1], starts[1:], starts[1:])
        gdn_decode_fused(*inputs, *one["core"], 1e-6, *one["states"], 16, *places, core, None)
        y = gemm.few_matmul(core.flatten(1), *one["out_proj"])
        routed = gemm.few_matmul_of_norm(y, residual, one["norms"][1], 1e-6, one["router"], keep=True)
        logits, residual, y = routed
        weights, ids = moe.route(logits, 4, True)
        x = moe.fused_moe(y, *one["experts"], weights, ids)
    return x + residual


@pytest.mark.parametrize("rows", [1, 2, 3, 8, 16])
@pytest.mark.parametrize("captured", [False, True])
def test_beginning_early_changes_no_bit(rows: int, captured: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers, found = [layer(rows) for _ in range(LAYERS)], []
    x, kept = torch.randn(rows, HIDDEN, device="cuda").bfloat16(), [one["states"] for one in layers]
    can = early.can_begin_early(x.device)
    monkeypatch.setattr(early, "EARLY_ROWS", 16)
    for soon in (False, True):
        for module in (early, ways):
            monkeypatch.setattr(module, "can_begin_early", lambda device, soon=soon: soon and can)
        for one, states in zip(layers, kept, strict=True):
            one["states"] = tuple(state.clone() for state in states)
        if not captured:
            outs = [step(layers, x) for _ in range(8)]
        else:
            step(layers, x)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out = step(layers, x)
            outs = []
            for _ in range(8):
                graph.replay()
                outs.append(out.clone())
        found.append([*outs, *(state for one in layers for state in one["states"])])
    assert not any(part.isnan().any() for part in found[0])
    assert all(torch.equal(late, soon) for late, soon in zip(*found, strict=True))
