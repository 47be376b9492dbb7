"""Who writes keys and values into SGLang's pool, and that both write the same."""

from __future__ import annotations

import inspect
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from sglang.srt.mem_cache.memory_pool import HybridLinearKVPool, MHATokenToKVPool

from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.sglang_integration import attention

from .in_process import load, run, start

SEQUENCES = [[5, 6, 7, 8, 9], [1], list(range(40))]
TOKENS = sum(map(len, SEQUENCES))
SIZES: dict[str, Any] = {
    "size": 64,
    "page_size": 1,
    "head_num": 2,
    "head_dim": 8,
    "device": "cpu",
    "enable_memory_saver": False,
}


def plain_pool(dtype: torch.dtype = torch.float32, **sizes: Any) -> MHATokenToKVPool:
    return MHATokenToKVPool(**SIZES | {"layer_num": 1, "dtype": dtype} | sizes)


def hybrid_pool(layers: list[int], **sizes: Any) -> HybridLinearKVPool:
    known = inspect.signature(HybridLinearKVPool).parameters
    wanted = SIZES | sizes | {"full_attention_layer_ids": layers, "mamba_pool": None, "dtype": torch.float32}
    return HybridLinearKVPool(**{name: value for name, value in wanted.items() if name in known})


def test_a_step_leaves_in_the_pool_what_sglang_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every entry of both, bit for bit, slots of no token among them; and the same hidden states."""
    path = write_random_checkpoint(tmp_path / "tiny", "tiny", dtype="float32")
    start(path, meeting=tmp_path / "meeting")
    model = load(path)
    full = [i for i, layer in enumerate(model.model.layers) if hasattr(layer, "self_attn")]
    heads = model.model.layers[full[0]].self_attn.sizes
    sizes = {"head_num": heads["num_kv_heads"], "head_dim": heads["head_dim"]}
    ours, theirs = (hybrid_pool(full, **sizes) for _ in range(2))
    saved: list[bool] = []
    split = attention.Qwen3NextGatedAttention.split

    def seen(self: Any, positions: Any, qkv: Any, places: Any = None) -> Any:
        saved.append(places is None)
        return split(self, positions, qkv, places)

    monkeypatch.setattr(attention.Qwen3NextGatedAttention, "split", seen)
    mine = run(model, SEQUENCES, pool=ours)
    assert saved == [False] * len(full)
    monkeypatch.setattr(attention, "places_to_write", lambda *args: None)
    assert all(torch.equal(one, other) for one, other in zip(mine, run(model, SEQUENCES, pool=theirs), strict=True))
    for layer in full:
        for one, other in zip(ours.get_kv_buffer(layer), theirs.get_kv_buffer(layer), strict=True):
            assert one[1 : 1 + TOKENS].any(dim=(1, 2)).all() and not bool(one[1 + TOKENS :].any())
            assert torch.equal(one, other)


class Translating(MHATokenToKVPool):
    """Stands for pools that do more than keep what they are given."""


REFUSED: dict[str, Any] = {
    "no pool": lambda: None,
    "another type": lambda: plain_pool(torch.bfloat16),
    "kept as bytes": lambda: plain_pool(torch.float8_e4m3fn),
    "a pool of its own kind": lambda: Translating(**SIZES | {"layer_num": 1, "dtype": torch.float32}),
}


@pytest.mark.parametrize("name", REFUSED)
def test_other_pools_are_sglangs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(REFUSED[name](), torch.arange(3), monkeypatch) is None


@pytest.mark.parametrize("slots", [torch.arange(3, dtype=torch.int32), torch.arange(6)[::2]])
def test_other_slots_are_sglangs(slots: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    assert places(plain_pool(), slots, monkeypatch) is None


def test_another_layout_is_sglangs(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = plain_pool()
    assert places(pool, torch.arange(3), monkeypatch) is not None
    pool.kv_cache_layout = "hnd"
    assert places(pool, torch.arange(3), monkeypatch) is None


def test_the_slot_of_padding_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    found = places(plain_pool(), torch.arange(3), monkeypatch)
    assert found.first_slot == 1 and list(found.keys.shape) == [1, 65, 2, 8]


def places(pool: Any, slots: torch.Tensor, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(attention, "get_attn_backend", lambda: SimpleNamespace(token_to_kv_pool=pool))
    return attention.places_to_write(0, torch.zeros(3, 16), slots)
