"""What end-to-end tests give vLLM on a GPU, where nobody can run them without one."""

import pytest
import torch

from tests.e2e import server
from tests.e2e.engine import Setup
from tests.e2e.engine_vllm import VllmEngine

SETUP = Setup("ratio2", 2, "align")


@pytest.mark.parametrize("gpu", [False, True])
def test_servers_fit_beside_others_on_a_gpu(gpu: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM refuses to start where less than its share is free, though the cache's bytes are said."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    flags, inside = VllmEngine().flags(SETUP), VllmEngine().inside(SETUP)
    assert "--kv-cache-memory-bytes" in flags and "kv_cache_memory_bytes" in inside
    assert ("--gpu-memory-utilization" in flags) == ("gpu_memory_utilization" in inside) == gpu
    assert ("--enforce-eager" in flags) == (SETUP.eager and not gpu)
    if gpu:
        share = float(flags[flags.index("--gpu-memory-utilization") + 1])
        assert 0 < share == inside["gpu_memory_utilization"] <= 0.15
        assert inside["async_scheduling"] is False  # drafts to order have to pass the scheduler


def test_flags_are_vllms() -> None:
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    found = parser.parse_args(["--gpu-memory-utilization", "0.1", "--kv-cache-memory-bytes", "38654705664"])
    assert (found.gpu_memory_utilization, found.kv_cache_memory_bytes) == (0.1, 38654705664)
    assert {"gpu_memory_utilization", "async_scheduling"} <= EngineArgs.__dataclass_fields__.keys()


def test_float32_attention_is_not_rounded_to_tf32() -> None:
    assert server.environment()["TRITON_F32_DEFAULT"] == "ieee"
