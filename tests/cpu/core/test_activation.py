"""The activation line."""

import torch
import triton

from qwen3next_plugin.activation import activation_line, plugin_version, state_type_advice
from qwen3next_plugin.kernels.dispatch import describe


def test_one_line_holds_versions_device_and_each_operations_choice() -> None:
    choices = {"gdn_prefill": "triton (chunk 64)", "rms_norm": "reference"}
    line = activation_line("vllm", "0.32.0", "NVIDIA H200", choices)
    assert line.startswith(f"qwen3next-plugin {plugin_version()} active: vllm 0.32.0, ")
    assert f"torch {torch.__version__}" in line and f"triton {triton.__version__}" in line
    assert line.endswith("device NVIDIA H200; kernels: gdn_prefill=triton (chunk 64), rms_norm=reference")


def test_line_breaks_cannot_split_it() -> None:
    line = activation_line("vllm", "0.32.0\n", "a\ndevice", {"op": "two\nlines"})
    assert "\n" not in line and "a device" in line and "op=two lines" in line


def test_what_the_kernels_say_of_themselves_fits() -> None:
    line = activation_line("vllm", "0.32.0", "cpu", describe("cpu"))
    assert "gdn_prefill=" in line and "fused_moe=" in line


def test_bfloat16_states_are_advised_against() -> None:
    advice = state_type_advice("bfloat16", "--mamba-ssm-cache-dtype")
    assert advice is not None and "--mamba-ssm-cache-dtype float16" in advice
    assert state_type_advice("float16", "--x") is None and state_type_advice("float32", "--x") is None
