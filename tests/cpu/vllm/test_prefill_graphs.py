"""Which sizes vLLM captures once prompts are among them, by vLLM's own choice of sizes."""

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("vllm")

from vllm.config import CompilationConfig, CUDAGraphMode, VllmConfig

from qwen3next_plugin.vllm_integration import prefill_graphs
from qwen3next_plugin.vllm_integration.prefill_graphs import MOST_TOKENS, capture_prompts, prompt_sizes


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "current_platform", SimpleNamespace(device_type="cuda"))


def config(max_tokens: int = 8192, eager: bool = False, requests: int = 128, **given: Any) -> Any:
    """As much of a VllmConfig as its choice of sizes looks at."""
    chosen = CompilationConfig(**given)
    chosen.cudagraph_mode = given.get("cudagraph_mode")  # unset as at this point of a start
    stub = SimpleNamespace(
        compilation_config=chosen,
        model_config=SimpleNamespace(enforce_eager=eager),
        scheduler_config=SimpleNamespace(max_num_seqs=requests, max_num_batched_tokens=max_tokens),
        uniform_decode_query_len=1,
        speculative_config=None,
        performance_mode="balanced",
    )
    stub._set_cudagraph_sizes = lambda: VllmConfig._set_cudagraph_sizes(stub)
    return stub


def final_sizes(vllm_config: Any) -> list[int]:
    """What vLLM makes of it in the end."""
    capture_prompts(vllm_config)
    vllm_config._set_cudagraph_sizes()
    chosen = vllm_config.compilation_config
    assert (chosen.max_cudagraph_capture_size or 0) == max(chosen.cudagraph_capture_sizes, default=0)
    return list(chosen.cudagraph_capture_sizes)


@pytest.mark.parametrize(("decoding", "most"), [(256, 8192), (512, 2048), (1, 7), (16, 16), (512, 300), (256, 100_000)])
def test_a_step_is_padded_by_a_quarter_at_most(decoding: int, most: int) -> None:
    sizes = prompt_sizes(decoding, most)
    assert sizes == sorted(set(sizes))
    assert all(decoding < size <= min(most, MOST_TOKENS) for size in sizes)
    for tokens in range(decoding + 1, min(most, MOST_TOKENS) + 1):
        assert next(size for size in sizes if size >= tokens) <= 1.25 * tokens + 1
    assert len(sizes) <= 24


def test_the_sizes_of_decoding_stay_as_vllm_chooses_them() -> None:
    plain = config()
    plain._set_cudagraph_sizes()
    decoding = plain.compilation_config.cudagraph_capture_sizes
    assert final_sizes(config()) == [*decoding, *prompt_sizes(decoding[-1], 8192)]
    assert final_sizes(config(max_tokens=1000))[-1] == 1000


@pytest.mark.parametrize(
    "asked",
    [
        {"cudagraph_capture_sizes": [1, 8]},
        {"max_cudagraph_capture_size": 64},
        {"cudagraph_mode": CUDAGraphMode.FULL_DECODE_ONLY},
        {"cudagraph_mode": CUDAGraphMode.FULL},
    ],
)
def test_what_a_user_chose_is_left_alone(asked: dict[str, Any]) -> None:
    plain = config(**asked)
    plain._set_cudagraph_sizes()
    assert final_sizes(config(**asked)) == plain.compilation_config.cudagraph_capture_sizes


def test_nothing_is_captured_where_nothing_is_to_be() -> None:
    assert final_sizes(config(eager=True)) == []
    assert final_sizes(config(max_tokens=200))[-1] == 200


def test_cpus_have_no_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefill_graphs, "current_platform", SimpleNamespace(device_type="cpu"))
    asked = config()
    capture_prompts(asked)
    assert asked.compilation_config.cudagraph_capture_sizes is None
