"""What end-to-end tests and measurements give SGLang on a GPU, where nobody can run them without one."""

import argparse
from pathlib import Path

import pytest
import torch
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.bench.engines import EngineSetup, Limits, command_of
from qwen3next_plugin.bench.rows import Side
from tests.e2e.engine import Setup
from tests.e2e.engine_sglang import SglangEngine


def parsed(flags: list[str]) -> argparse.Namespace:
    """What SGLang reads from flags; it ends the process where it does not know one."""
    parser = argparse.ArgumentParser()
    ServerArgs.add_cli_args(parser)
    return parser.parse_args(flags)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_gpu_gets_its_own_attention_and_its_pools_beside_others(
    gpu: bool, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    setup = Setup("ratio2", 2, "extra_buffer", dtype=dtype)
    found = parsed(["--model-path", "m", *SglangEngine().flags(setup)])
    assert (found.device == "cpu") == (not gpu)
    # FlashAttention, the default there, has no float32; on a GPU bfloat16 is tested with what is served by default.
    assert found.attention_backend == ("torch_native" if not gpu else "triton" if dtype == "float32" else None)
    assert found.mem_fraction_static == (0.95 if gpu else 0.3)
    assert found.max_total_tokens and found.max_mamba_cache_size, "or the share would be filled"
    assert ("TRITON_F32_DEFAULT" in SglangEngine().variables()) == gpu


@pytest.mark.parametrize("eager", [False, True])
def test_sglang_knows_the_flags_of_a_measurement(eager: bool) -> None:
    command = command_of(Side("sglang", True), EngineSetup(), Path("m"), Limits(33000, 256), 1234, eager=eager)
    found = parsed(command[command.index("sglang.launch_server") + 1 :])
    assert (found.context_length, found.max_running_requests, found.chunked_prefill_size) == (33000, 256, 8192)
    assert found.disable_radix_cache and found.cuda_graph_max_bs_decode == 256
    assert found.disable_prefill_cuda_graph == found.disable_decode_cuda_graph == eager
