"""Full attention inside vLLM: who writes its cache, that our view of it is vLLM's, and what the opaque op fills."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from vllm.utils.torch_utils import _encode_layer_name

from qwen3next_plugin.kernels.rope import qk_norm_rope
from qwen3next_plugin.vllm_integration import attention
from tests.helpers import nan_like

PAGES, PAGE, HEADS, KV_HEADS, DIM, TOKENS = 4, 6, 4, 2, 8, 5
BACKENDS = "vllm.v1.attention.backends"


def paged(order: tuple[int, ...] = (0, 1, 2, 3)) -> torch.Tensor:
    """vLLM's cache, its dimensions in that order in memory."""
    shape = (PAGES, KV_HEADS, PAGE, 2 * DIM)
    inverse = sorted(range(4), key=order.__getitem__)
    return torch.randn([shape[i] for i in order]).permute(inverse)


def layer_of(name: str = "FLASH_ATTN", includes: bool = False, **changes: Any) -> Any:
    backend = SimpleNamespace(get_name=lambda: name, forward_includes_kv_cache_update=includes)
    kept: dict[str, Any] = {"dtype": torch.bfloat16, "kv_cache_torch_dtype": torch.bfloat16}
    kept |= {"kv_sharing_target_layer_name": None, "query_quant": None}
    sizes = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_size": DIM}
    return SimpleNamespace(**{"attn_backend": backend} | kept | sizes | changes)


@pytest.mark.parametrize(
    ("changes", "apart", "ours"),
    [
        ({}, True, True),
        ({"name": "FLASHINFER"}, True, True),
        ({"name": "TRITON_ATTN"}, True, True),
        ({"name": "CPU_ATTN"}, True, False),
        ({"name": "FLASH_ATTN_DIFFKV"}, True, False),
        ({"kv_cache_torch_dtype": torch.float8_e4m3fn}, True, False),
        ({"query_quant": object()}, False, True),
        ({"includes": True}, False, True),
        ({"kv_sharing_target_layer_name": "model.layers.3"}, False, True),
    ],
)
def test_who_writes_a_cache(changes: dict[str, Any], apart: bool, ours: bool) -> None:
    layer = layer_of(**changes)
    assert attention.writes_apart(layer) is apart
    assert attention.takes_our_writes(layer) is ours


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize(
    ("module", "implementation", "writer"),
    [
        ("flash_attn", "FlashAttentionImpl", "reshape_and_cache_flash"),
        ("triton_attn", "TritonAttentionImpl", "triton_reshape_and_cache_flash"),
    ],
)
def test_our_views_are_those_vllm_writes_to(
    module: str, implementation: str, writer: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = import_module(f"{BACKENDS}.{module}")
    caches: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(backend, writer, lambda key, value, *rest: caches.append(rest[:2]), raising=False)
    own = SimpleNamespace(attn_type="decoder", head_size=DIM, kv_cache_dtype="auto", _is_per_token_head_quant=False)
    cache, scales = paged(order), SimpleNamespace(_k_scale=None, _v_scale=None)
    getattr(backend, implementation).do_kv_cache_update(own, scales, None, None, cache, None)
    for mine, theirs in zip(attention.keys_and_values(cache, DIM), caches[0], strict=True):
        assert mine.data_ptr() == theirs.data_ptr()
        assert mine.shape == theirs.shape and mine.stride() == theirs.stride()


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3)])
@pytest.mark.parametrize("writer", ["nobody, in profiling", "ours", "vLLM's"])
def test_the_op_fills_cache_gate_and_output(
    writer: str, order: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = paged(order)
    before, slots = cache.clone(), torch.tensor([8, -1, 23, 0])  # of padded tokens there may be no slot at all
    written: list[torch.Tensor] = []
    update = SimpleNamespace(do_kv_cache_update=lambda layer, *call: written.extend(call))
    layer = layer_of("FLASH_ATTN" if writer == "ours" else "CPU_ATTN", impl=update)
    context: Any = ({}, layer, cache, None if writer.startswith("nobody") else slots)
    monkeypatch.setattr(attention, "get_attention_context", {"layer": context}.__getitem__)
    attended_to: list[torch.Tensor] = []

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, output: torch.Tensor, name: Any) -> None:
        attended_to.extend((q, k, v))
        output.copy_(q)

    monkeypatch.setattr(attention, "unified_attention_with_output", attend)
    qkv = torch.randn(TOKENS, 2 * (HEADS + KV_HEADS) * DIM)
    constants = (torch.randn(DIM), torch.randn(DIM), torch.rand(9, 4))
    positions = torch.arange(TOKENS)
    out, gate = nan_like(TOKENS, HEADS, DIM), nan_like(TOKENS, HEADS * DIM)
    attention.qwen3next_plugin_attention(qkv, *constants, positions, out, gate, 1e-6, _encode_layer_name("layer"))

    sizes: dict[str, Any] = {"num_heads": HEADS, "num_kv_heads": KV_HEADS, "head_dim": DIM}
    q, k, v, expected_gate = qk_norm_rope(qkv, *constants, positions, **sizes, eps=1e-6)
    assert torch.equal(out.flatten(1), q) and torch.equal(gate, expected_gate)
    for seen, expected in zip(attended_to, (q, k, v), strict=True):
        assert torch.equal(seen, expected.view(TOKENS, -1, DIM))
    if writer == "ours":
        for token, (page, place) in {0: (1, 2), 2: (3, 5), 3: (0, 0)}.items():
            both = (k[token].view(KV_HEADS, DIM), v[token].view(KV_HEADS, DIM))
            before[page, :, place] = torch.cat(both, dim=-1)
    assert torch.equal(cache, before)
    assert len(written) == (4 if writer == "vLLM's" else 0)
    for seen, expected in zip(written, (*attended_to[1:], cache, slots), strict=False):
        assert seen is expected


def test_the_op_says_what_it_writes_and_traces_without_running() -> None:
    op = torch.ops.vllm.qwen3next_plugin_attention.default
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["attended", "gate"]
    with FakeTensorMode():
        qkv, weight, positions = torch.empty(3, 96), torch.empty(8), torch.empty(3, dtype=torch.int64)
        out = torch.empty(3, 32)
        name = _encode_layer_name("no such layer")
        assert op(qkv, weight, weight, torch.empty(9, 4), positions, out, out, 1e-6, name) is None
