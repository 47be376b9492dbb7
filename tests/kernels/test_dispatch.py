"""Choosing implementations, saying which, and what kernels may import."""

import ast
import re
import sys
from pathlib import Path

import pytest
import torch

import qwen3next_plugin.kernels as kernels
from qwen3next_plugin.kernels import dispatch, gemm, moe, norm, rope
from qwen3next_plugin.kernels.dispatch import Choice
from qwen3next_plugin.kernels.gpus import NO_GPU, Target, target_named

KERNELS = Path(kernels.__path__[0])
COMPILED_OPS = {
    "rms_norm": norm,
    "add_rms_norm": norm,
    "qk_norm_rope": rope,
    "sigmoid_gate": rope,
    "route": moe,
    "fused_moe": moe,
    "add_shared_expert": moe,
    "quantize_tokens": gemm,
    "block_fp8_matmul": gemm,
    "quantized_matmul": gemm,
}


def test_automatic_choice_follows_the_device(device: str) -> None:
    tensor = torch.empty(1, device=device)
    assert dispatch.choose(tensor, None) == ("triton" if device == "cuda" else "reference")
    assert dispatch.choose(tensor, "reference") == "reference"
    assert dispatch.choose(tensor, "triton") == "triton"


def test_triton_on_a_cpu_tensor_needs_the_interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="tensor on cpu.*TRITON_INTERPRET=1"):
        dispatch.choose(torch.empty(1), "triton")


def test_unknown_backend_is_refused() -> None:
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        dispatch.choose(torch.empty(1), "cuda")
    with pytest.raises(ValueError, match="backend is 'fast'"):
        norm.rms_norm(torch.ones(2, 4), torch.ones(4), 1e-6, backend="fast")


def test_describe_names_every_operation() -> None:
    on_cuda, on_cpu = dispatch.describe("cuda"), dispatch.describe("cpu")
    of_steps = {
        "causal_conv1d_prefill",
        "gdn_prefill",
        "gdn_decode",
        "gdn_decode_fused",
        "gdn_verify",
        "rms_norm_gated",
    }
    expected = set(COMPILED_OPS) | of_steps
    assert expected <= set(on_cuda) and on_cuda.keys() == on_cpu.keys()
    assert all(text.startswith("triton") for text in on_cuda.values())
    assert all(text.startswith("reference") for text in on_cpu.values())
    assert "activations" in on_cuda["fused_moe"]
    assert all("INT4 and INT8 weights" in on_cuda[op] for op in ("fused_moe", "quantized_matmul"))
    with pytest.raises(ValueError, match="device_type is 'tpu'"):
        dispatch.describe("tpu")


def test_declarations_are_asked_for_when_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_DECLARED", dict(dispatch._DECLARED))
    said = ["first"]
    dispatch.declare("an_operation", cuda=lambda target: [Choice(why=said[-1]), Choice("others", "library")])
    said.append("second")
    assert dispatch.describe("cuda")["an_operation"] == "triton and library (all: second)"
    assert dispatch.describe("cpu")["an_operation"] == "reference"


def test_the_table_is_that_of_the_gpu_asked_for() -> None:
    """Where a choice hangs on the GPU, rows differ; what an engine's log says comes from the same rows."""

    def rows(target: Target | None, op: str) -> list[Choice]:
        return [row.choice for row in dispatch.table(target) if row.operation == op]

    h200, a100 = target_named("h200"), target_named("NVIDIA A100-SXM4-80GB")
    assert (h200.capability, a100.capability) == ((9, 0), (8, 0))
    rounded = [choice for choice in rows(h200, "fused_moe") if "rounded" in choice.why]
    assert [choice.shapes.split(", if")[0] for choice in rounded] == [
        "from 17 tokens, FP8 blocks",
        "from 17 tokens, FP8 blocks, down of a share's rows of up to 128 columns, in tiles of 16 pairs",
        "from 2048 tokens, FP8 blocks of 128",
    ]
    said = rounded[0].tiles.removeprefix("configs for h200: ").split(";")[0]
    assert sum(map(int, re.findall(r"\d+", said))) == len(list((KERNELS / "moe" / "configs" / "h200").glob("E=*.json")))
    assert not any("rounded" in choice.why for choice in rows(a100, "fused_moe"))
    assert "Marlin" in " ".join(choice.why for choice in rows(a100, "linear projections and router"))
    assert "Marlin" not in " ".join(choice.why for choice in rows(h200, "linear projections and router"))
    assert [choice.runs for choice in rows(None, "fused_moe")] == ["reference"]
    for op, text in dispatch.describe("cuda").items():
        assert all(choice.runs in text for choice in rows(dispatch.present() or NO_GPU, op))
    assert "attention over the cache" not in dispatch.describe("cuda")
    assert [choice.runs for choice in rows(h200, "attention over the cache")] == ["engine"]
    with pytest.raises(ValueError, match="'h300' is no GPU known here: use one of h200, h100"):
        target_named("h300")


def test_the_table_follows_the_preference() -> None:
    try:
        dispatch.prefer(dispatch.REFERENCE)
        own = {row.choice.runs for row in dispatch.table(target_named("h200")) if row.own}
    finally:
        dispatch.prefer(None)
    assert own == {"reference"}


@pytest.mark.parametrize("name", COMPILED_OPS)
def test_public_functions_are_registered_custom_ops(name: str) -> None:
    schema = getattr(torch.ops.qwen3next, name).default._schema
    assert not schema.is_mutable
    assert "str? backend=None" in str(schema)
    function = getattr(COMPILED_OPS[name], name)
    assert function.__name__ == name and function.__doc__


def test_kernels_import_neither_engines_nor_the_core() -> None:
    """Relative imports stay inside kernels/; absolute ones are torch, triton and the standard library."""
    allowed = {"torch", "triton", "numpy"}
    for path in KERNELS.rglob("*.py"):
        depth = len(path.relative_to(KERNELS).parts)
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.level:
                assert node.level <= depth, f"{path} line {node.lineno} leaves kernels/"
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [a.name for a in node.names]
                for root in (name.split(".")[0] for name in names):
                    assert root in allowed or root in sys.stdlib_module_names, f"{path} imports {root}"
