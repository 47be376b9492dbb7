"""What drafts take of SGLang's memory, and what SGLang then has for requests."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.configs.mamba_utils import Mamba2CacheParams, Mamba2StateDType, Mamba2StateShape
from sglang.srt.mem_cache import kv_cache_configurator
from sglang.srt.mem_cache.kv_cache_configurator import KVCacheConfigurator
from sglang.srt.mem_cache.memory_pool import HybridReqToTokenPool
from sglang.srt.speculative.spec_info import SpeculativeAlgorithm

from qwen3next_plugin.sglang_integration import drafts
from qwen3next_plugin.sglang_integration.config import LayerTypesConfig, Qwen3NextCacheParams
from tests.cpu.sglang.gdn_pool import Harness, publish

REQUESTS, DRAFT_TOKENS, GIB = 16, 4, 2**30


def published_params(kind: type[Mamba2CacheParams] = Qwen3NextCacheParams) -> Mamba2CacheParams:
    """The states of the published model on one rank."""
    shape = Mamba2StateShape.create(
        tp_world_size=1,
        intermediate_size=32 * 128,
        n_groups=16,
        num_heads=32,
        head_dim=128,
        state_size=128,
        conv_kernel=4,
    )
    dtype = Mamba2StateDType(conv=torch.bfloat16, temporal=torch.float32)
    return kind(shape=shape, layers=[layer for layer in range(48) if layer % 4 != 3], dtype=dtype)


def test_records_are_a_fiftieth_of_the_states() -> None:
    records = drafts.records_for(published_params(), REQUESTS, DRAFT_TOKENS, "meta")
    inputs, keys, writes, decays = 2 * 8192, 4 * 16 * 128, 4 * 32 * 128, 4 * 32
    assert records.nbytes == 36 * REQUESTS * DRAFT_TOKENS * (inputs + keys + writes + decays)
    states = 36 * REQUESTS * DRAFT_TOKENS * 4 * 32 * 128 * 128
    assert 50 < states / records.nbytes < 52


def test_the_models_config_tells_its_states_apart() -> None:
    publish()
    config = LayerTypesConfig(num_hidden_layers=4, full_attention_interval=4)
    params = config.mamba2_cache_params
    assert isinstance(params, Qwen3NextCacheParams)
    assert params.layers == [0, 1, 2] and params.shape.temporal[1:] == (128, 128)


@pytest.fixture
def schedule(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """SGLang's settings as far as they size the pool; what it decides is written there."""
    schedule = SimpleNamespace(
        max_running_requests=REQUESTS,
        max_mamba_cache_size=None,
        mamba_full_memory_ratio=0.9,
        disable_overlap_schedule=False,
    )
    spec = SimpleNamespace(speculative_num_draft_tokens=DRAFT_TOKENS)

    def override(_: str, **values: Any) -> None:
        vars(schedule).update(values)

    for name, value in (("get_schedule", schedule), ("get_spec", spec)):
        monkeypatch.setattr(kv_cache_configurator, name, lambda value=value: value)
    monkeypatch.setattr(kv_cache_configurator, "get_context", lambda: SimpleNamespace(override=override))
    monkeypatch.setattr(drafts, "get_schedule", lambda: schedule)
    monkeypatch.setattr(drafts, "max_speculative_num_draft_tokens", lambda: DRAFT_TOKENS)
    return schedule


def configurator(model_type: str, algorithm: SpeculativeAlgorithm) -> Any:
    made: Any = object.__new__(KVCacheConfigurator)
    values: dict[str, Any] = {
        "model_config": SimpleNamespace(hf_config=SimpleNamespace(model_type=model_type), num_hidden_layers=48),
        "mambaish_config": SimpleNamespace(mamba2_cache_params=published_params()),
        "hybrid_gdn_config": None,
        "hybrid_kda_config": None,
        "spec_algorithm": algorithm,
        "ps": SimpleNamespace(pp_size=1, attn_dp_size=1),
        "pp_size": 1,
        "attn_dp_size": 1,
        "extra_mamba_cache_bytes_per_req": 0,
        "is_draft_worker": False,
    }
    for name, value in values.items():
        if hasattr(KVCacheConfigurator, name):
            setattr(made, name, value)
    return made


def test_what_drafts_would_take_goes_to_requests(schedule: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    publish()
    if hasattr(KVCacheConfigurator, "fused_entry_bytes"):
        monkeypatch.setattr(KVCacheConfigurator, "fused_entry_bytes", lambda self, name: None)
    sizes = {}
    for model_type in ("qwen3_next", "qwen3_5_moe"):
        for algorithm in (SpeculativeAlgorithm.NONE, SpeculativeAlgorithm.EAGLE):
            schedule.max_mamba_cache_size = None
            made = configurator(model_type, algorithm)
            left = made._handle_max_mamba_cache(30.0)
            assert made.spec_algorithm is algorithm
            sizes[model_type, algorithm.is_none()] = (schedule.max_mamba_cache_size, left)
    assert sizes["qwen3_next", True] == sizes["qwen3_5_moe", True]
    (ours, left), (plain, _), (theirs, _) = (
        sizes[key] for key in (("qwen3_next", False), ("qwen3_next", True), ("qwen3_5_moe", False))
    )
    a_request = published_params().mamba_cache_per_req / GIB
    records = drafts.records_for(published_params(), REQUESTS, DRAFT_TOKENS, "meta").nbytes / GIB
    assert 0 <= plain - ours <= 1 + records / a_request
    assert theirs < 0.7 * ours
    # What is left to the KV cache, the states and the records are all there was.
    assert left + (ours + 1) * a_request + records == pytest.approx(30.0)


def test_only_qwen3_nexts_pools_keep_records() -> None:
    publish()
    ours = Harness(num_drafts=2).pool.mamba_pool
    assert not hasattr(ours.mamba_cache, "intermediate_ssm")
    assert ours.draft_records.inputs.shape[:3] == (2, 4, 3)
    other = Harness(num_drafts=0).pool.mamba_pool
    assert not hasattr(other, "draft_records")
    params = published_params(Mamba2CacheParams)
    stock = HybridReqToTokenPool(
        size=1,
        mamba_size=1,
        mamba_spec_state_size=1,
        max_context_len=8,
        device="cpu",
        enable_memory_saver=False,
        cache_params=Mamba2CacheParams(shape=params.shape, layers=[0], dtype=params.dtype),
        mamba_layer_ids=[0],
        enable_mamba_extra_buffer=False,
        speculative_num_draft_tokens=2,
    ).mamba_pool
    assert stock.mamba_cache.intermediate_ssm.shape[:3] == (1, 2, 2) and not hasattr(stock, "draft_records")
