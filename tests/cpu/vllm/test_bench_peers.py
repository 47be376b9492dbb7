"""The adapters of `qwen3next bench kernels` call vLLM's functions as the installed version declares them.

None of the kernels runs here: each call is bound to the real function's signature, and something of the right shape
comes back.
"""

import importlib
import inspect
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from qwen3next_plugin.bench.kernels import peers
from qwen3next_plugin.bench.kernels.cases import parse_case
from qwen3next_plugin.bench.kernels.moe_work import MoeBuilder
from qwen3next_plugin.bench.kernels.peers import common, vllm_gdn, vllm_layers, vllm_moe
from qwen3next_plugin.bench.kernels.session import builder
from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.shapes import config_of

SPEC = parse_config(config_of("tiny", fp8=True))
ABSENT = {"flashinfer", "sgl_kernel"}
Answer = Callable[[dict[str, Any]], Any]


def prepared_heads(a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    tokens, keys = a["conv_output"].shape[0], (a["num_k_heads"], a["head_k_dim"])
    q, v = torch.zeros(tokens, *keys), torch.zeros(tokens, a["a"].shape[1], a["head_v_dim"])
    return q, q, v, torch.zeros(tokens, v.shape[1]), torch.zeros(tokens, v.shape[1])


def product(a: dict[str, Any]) -> torch.Tensor:
    return a["input"].new_zeros(a["input"].shape[0], a["weight"].shape[0])


ANSWERS: dict[str, Answer] = {
    "causal_conv1d_update": lambda a: a["x"],
    "causal_conv1d_fn": lambda a: a["x"],
    "fused_recurrent_gated_delta_rule_packed_decode": lambda a: None,
    "fused_sigmoid_gating_delta_rule_update": lambda a: (torch.zeros_like(a["v"]), a["initial_state"]),
    "gated_delta_rule_decode_pretranspose": lambda a: (torch.zeros_like(a["kwargs"]["v"]), a["kwargs"]["state"]),
    "fused_gdn_decode_post_conv_mtp": lambda a: None,
    "rmsnorm_fn": lambda a: a["x"],
    "compute_causal_conv1d_metadata": lambda a: ({}, torch.zeros(1), torch.zeros(1)),
    "fused_post_conv_prep": prepared_heads,
    "fi_chunk_gated_delta_rule": lambda a: (torch.zeros_like(a["v"]), a["initial_state"]),
    "chunk_gated_delta_rule": lambda a: (torch.zeros_like(a["v"]), a["initial_state"]),
    "prepare_chunk_indices": lambda a: torch.zeros(1, 2),
    "prepare_chunk_offsets": lambda a: torch.zeros(2),
    "fused_add_rms_norm": lambda a: None,
    "fused_qk_rmsnorm_rope_gate": lambda a: (torch.zeros(a["k"].shape[0], a["num_q_heads"] * a["head_dim"]), a["k"], 0),
    "reshape_and_cache_flash": lambda a: None,
    "flashinfer_fp8_blockscale_gemm": lambda a: product(a["kwargs"]),
    "per_token_group_quant_fp8": lambda a: (a["x"], torch.ones(a["x"].shape[0], 1)),
    "fp8_gemm_nt": lambda a: None,
    "cutlass_scaled_mm": lambda a: a["a"].new_zeros(a["a"].shape[0], a["b"].shape[1]),
    "fused_experts": lambda a: torch.zeros_like(a["hidden_states"]),
    "override_config": lambda a: nullcontext(),
    "get_config_file_name": lambda a: "E=8,N=32.json",
    "try_get_optimal_moe_config": lambda a: {"BLOCK_SIZE_M": 16},
}


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of what was called, each with arguments that its signature takes."""
    names: list[str] = []

    def named(path: str) -> Any:
        module, _, name = path.partition(":")
        if module.split(".")[0] in ABSENT:
            signature = inspect.signature(lambda *args, **kwargs: None)
        else:
            real = getattr(importlib.import_module(module), name)
            if name not in ANSWERS:
                return real
            signature = inspect.signature(real)

        def call(*args: Any, **kwargs: Any) -> Any:
            names.append(name)
            return ANSWERS[name](dict(signature.bind(*args, **kwargs).arguments))

        return call

    for module in (peers, vllm_gdn, vllm_layers, vllm_moe):
        monkeypatch.setattr(module, "named", named)
    monkeypatch.setattr(common, "compiled", lambda function: function)
    for module in (vllm_gdn, vllm_layers):
        monkeypatch.setattr(module, "compiled", lambda function: function)
    yield names


@pytest.mark.parametrize(
    ("name", "series", "kernel"),
    [
        ("gdn-decode-b3", "vllm", "fused_recurrent_gated_delta_rule_packed_decode"),
        ("gdn-decode-b3", "vllm-flashinfer", "gated_delta_rule_decode_pretranspose"),
        ("gdn-decode-b3-bf16state", "vllm-flashinfer", "gated_delta_rule_decode_pretranspose"),
        ("gdn-verify4-b3", "vllm", "fused_sigmoid_gating_delta_rule_update"),
        ("gdn-verify4-b3", "vllm-cuda", "fused_gdn_decode_post_conv_mtp"),
        ("gdn-prefill-2x70", "vllm", "fi_chunk_gated_delta_rule"),
        ("gdn-prefill-2x70", "vllm-triton", "chunk_gated_delta_rule"),
        ("conv-prefill-33", "vllm", "causal_conv1d_fn"),
        ("norm-add-5", "vllm", "fused_add_rms_norm"),
        ("norm-add-5", "vllm-inductor", ""),
        ("qk-norm-rope-write-5", "vllm", "fused_qk_rmsnorm_rope_gate"),
        ("dense-qkvz-m3", "vllm", "flashinfer_fp8_blockscale_gemm"),
        ("dense-qkvz-m3", "vllm-deepgemm", "fp8_gemm_nt"),
        ("dense-qkvz-m3", "vllm-cutlass", "cutlass_scaled_mm"),
        ("dense-router-m3", "vllm", ""),
        ("moe-fp8-tp1-m3", "vllm", "fused_experts"),
        ("moe-bf16-tp2-m3", "vllm", "fused_experts"),
    ],
)
def test_calls_fit_the_signatures(name: str, series: str, kernel: str, called: list[str]) -> None:
    case = parse_case("moe" if name.startswith("moe") else "kernels", name)
    work = builder(MoeBuilder(SPEC, torch.device("cpu")))(case, SPEC, "vllm", torch.device("cpu"))
    prepare = dict(peers.peers_of("vllm", case.op))[series]
    alternatives = prepare(work)
    expected = work.own["own"].calls[0]()
    for prepared in alternatives:
        assert len(prepared.calls) == len(work.inputs)
        assert prepared.calls[0]().numel() == expected.numel()
    assert alternatives and (not kernel or kernel in called)


def test_other_configs_are_of_as_many_experts_in_the_same_type() -> None:
    spec = parse_config(config_of("80b", fp8=True))
    work = builder_of_shapes(spec, 512, 128)
    found = list(vllm_moe._others(work))
    assert found and all(name.startswith("E=512,") and "fp8_w8a8" in name for name, _ in found)
    assert all("BLOCK_SIZE_M" in config for _, config in found)
    assert "N=128," in found[0][0]


def builder_of_shapes(spec: Any, experts: int, inner: int) -> Any:
    """A work whose weights have the real shapes and no memory."""
    from types import SimpleNamespace

    fp8 = torch.float8_e4m3fn
    one = SimpleNamespace(
        w2=torch.empty(experts + 1, spec.hidden_size, inner, dtype=fp8, device="meta"),
        s13=torch.empty(1, device="meta"),
    )
    return SimpleNamespace(inputs=[one], case=parse_case("moe", "moe-fp8-tp4-m8"))


def test_every_name_of_an_adapter_is_a_function_of_it() -> None:
    for (engine, op), (module, functions) in peers._ADAPTERS.items():
        adapter = importlib.import_module(f"{peers.__name__}.{module}")
        assert engine in functions, op
        assert all(callable(getattr(adapter, function)) for function in functions.values())
