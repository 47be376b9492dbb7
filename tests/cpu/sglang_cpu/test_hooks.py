"""Every target that the stand-ins hook exists in this SGLang, and hooking it leaves the rest of it alone."""

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import pytest
from qwen3next_sglang_cpu_standins import attention, plugin, surroundings

pytest.importorskip("sglang")


def resolve(target: str) -> Any:
    """What a dotted path names, however much of it is the module."""
    parts = target.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for name in parts[cut:]:
            found = getattr(found, name)
        return found
    raise AssertionError(target)


@pytest.mark.parametrize("target", [*plugin.REPLACE, *plugin.AROUND])
def test_the_target_is_there(target: str) -> None:
    assert callable(resolve(target))


def test_a_verify_batch_is_a_prefill_of_its_drafts() -> None:
    import torch

    batch = SimpleNamespace(
        forward_mode=SimpleNamespace(is_target_verify=lambda: True),
        spec_info=SimpleNamespace(draft_token_num=3),
        seq_lens=torch.tensor([5, 9]),
        extend_prefix_lens=None,
        extend_seq_lens=None,
    )
    seen: list[list[int]] = []

    def original(self: Any, q: Any, k: Any, v: Any, layer: Any, given: Any) -> str:
        seen.extend(t.tolist() for t in (given.seq_lens, given.extend_prefix_lens, given.extend_seq_lens))
        return "out"

    assert attention.forward_extend(original, None, 1, 2, 3, None, batch) == "out"
    assert seen == [[8, 12], [5, 9], [3, 3]]
    assert batch.seq_lens.tolist() == [5, 9] and batch.extend_prefix_lens is None and batch.extend_seq_lens is None


def test_the_check_of_extra_buffer_only_forgets_that_there_is_no_gpu() -> None:
    mamba_hook: Any = import_module("sglang.srt.arg_groups.mamba_hook")
    real = mamba_hook.get_platform

    seen = []

    def original(wish: str, *, chunk: int) -> None:
        platform = mamba_hook.get_platform()
        assert platform.is_cuda and not platform.is_hip
        seen.append((wish, chunk))

    surroundings.validate_mamba_extra_buffer(original, "kept", chunk=64)
    assert seen == [("kept", 64)] and mamba_hook.get_platform is real
