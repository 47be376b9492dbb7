"""Profiles: traces become GPU time by part, and a recorder profiles the steps it is asked for."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qwen3next_plugin.bench.profile import PARTS, part_of, profile_table, read_trace, summarize
from qwen3next_plugin.recording import PROFILE_REQUEST, Recorder


def _trace(path: Path) -> Path:
    """Two steps: 10 us of MoE, 5 of GDN beside it, a gap of 5, 4 of attention, a copy of 1."""
    events: list[dict[str, Any]] = [{"ph": "X", "cat": "cpu_op", "name": "aten::mm", "ts": 0, "dur": 1000}]
    for step in range(2):
        at = 100.0 * step
        for name, start, length, kind in (
            ("fused_moe_kernel", 0, 10, "kernel"),
            ("chunk_gated_delta_rule_fwd_kernel_h", 5, 5, "kernel"),
            ("flash_fwd_splitkv_kernel", 15, 4, "kernel"),
            ("Memcpy DtoD", 19, 1, "gpu_memcpy"),
        ):
            events.append({"ph": "X", "cat": kind, "name": name, "ts": at + start, "dur": length})
    events.append({"ph": "i", "cat": "kernel", "name": "an instant", "ts": 3})
    text = json.dumps({"traceEvents": events[::-1]}).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


@pytest.mark.parametrize("name", ["trace.json", "trace.json.gz"])
def test_a_trace_is_summed_up(tmp_path: Path, name: str) -> None:
    launches = read_trace(_trace(tmp_path / name))
    assert len(launches) == 8
    found = summarize(launches, steps=2, layers=2)
    assert found["ms"] == pytest.approx(0.060)  # 120 us from the first start to the last end
    assert found["idle_ms"] == pytest.approx(0.060 - 0.015)
    assert (found["launches"], found["launches_a_layer"]) == (4, 2)
    assert {part: entry["ms"] for part, entry in found["parts"].items() if entry["ms"]} == {
        "moe": 0.010,
        "gdn": 0.005,
        "attention": 0.004,
        "other": 0.001,
    }
    assert found["longest"][0]["name"] == "fused_moe_kernel"
    table = profile_table({"stock-vllm": found, "plugin-vllm": found})
    assert all(part in table for part in PARTS)
    assert "0.045 ms" in table


@pytest.mark.parametrize(
    ("part", "names"),
    [
        (
            "moe",
            ["moe_align_block_size_kernel", "void deep_gemm::sm90_m_grouped_fp8", "_grouped_kernel", "_place_kernel"],
        ),
        ("moe", ["void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, 0u, 1024u, 2048u, 513u, 128u, 192u"]),
        ("dense", ["void deep_gemm::sm90_fp8_gemm_1d2d_impl<(cute::UMMA::Major)0, 0u, 1024u, 2048u, 1u, 256u, 128u"]),
        ("moe", ["topkGatingSoftmax", "void sgl_hopper::act_and_mul_kernel<__nv_bfloat16>", "_route_kernel"]),
        (
            "gdn",
            ["fused_recurrent_gated_delta_rule_packed_decode_kernel", "_causal_conv1d_update_kernel", "solve_tril_16"],
        ),
        (
            "gdn",
            ["_recurrent_kernel", "_prefill_kernel", "_update_kernel", "recompute_w_u_fwd_kernel", "l2norm_fwd_kernel"],
        ),
        ("attention", ["flash_fwd_kernel", "reshape_and_cache_flash_kernel", "_qk_norm_rope_kernel", "fmha_v3_sm90"]),
        (
            "dense",
            ["nvjet_sm90_tst_64x8", "sm90_fp8_gemm_1d2d_impl", "_block_fp8_matmul_kernel", "void gemv2T_kernel_val"],
        ),
        ("norm and quantisation", ["_quantize_tokens_kernel", "per_token_group_quant_8bit_kernel", "_rms_norm_kernel"]),
        ("norm and quantisation", ["triton_red_fused_add_mean_mul_pow_rsqrt_rms_norm_0"]),
        ("sampling", ["void at::native::reduce_kernel<ArgMaxOps_argmax>", "top_k_top_p_sampling_kernel"]),
        ("other", ["void at::native::elementwise_kernel", "Memset (Device)"]),
    ],
)
def test_kernels_belong_to_parts(part: str, names: list[str]) -> None:
    assert {name: part_of(name) for name in names} == dict.fromkeys(names, part)


def test_a_recorder_profiles_the_steps_asked_for(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path)
    trace = tmp_path / "trace.json"
    recorder.step(2, 2, 1)
    (tmp_path / PROFILE_REQUEST).write_text(json.dumps({"requests": 2, "steps": 2, "trace": str(trace)}))
    recorder.step(1, 900, 900)  # not yet
    for _ in range(3):
        recorder.step(2, 2, 1)
        torch.randn(8, 8) @ torch.randn(8, 8)
    assert trace.with_suffix(".done").read_text() == "2"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert names.count("aten::matmul") == 2
    assert not (tmp_path / PROFILE_REQUEST).exists()
    recorder.step(2, 2, 1)  # and on it goes


def test_a_prompt_is_profiled_without_what_is_decoded_before_it(tmp_path: Path) -> None:
    """SGLang overlaps steps: behind the small request that begins a profile comes a step that nobody asked for."""
    recorder, trace = Recorder(tmp_path), tmp_path / "trace.json"
    (tmp_path / PROFILE_REQUEST).write_text(json.dumps({"requests": 0, "steps": 1, "trace": str(trace)}))
    recorder.step(1, 1, 1)  # nor what comes before it
    recorder.step(1, 4, 4)
    torch.randn(8, 8) @ torch.randn(8, 8)
    recorder.step(1, 1, 1)
    assert not trace.exists()
    torch.randn(8, 8).exp()
    recorder.step(1, 900, 900)
    assert trace.with_suffix(".done").read_text() == "1"
    names = [event.get("name") for event in json.loads(trace.read_text())["traceEvents"]]
    assert (names.count("aten::matmul"), names.count("aten::exp")) == (0, 1)
