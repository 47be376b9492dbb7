"""Compilations of this package's kernels are counted, and told of where users wait for them."""

import json
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3next_plugin.kernels import compilations
from tests.helpers import output_of

KERNEL = "_rms_norm_kernel"


def test_only_our_compilations_while_serving_are_told_of() -> None:
    found = json.loads(output_of("tests.kernels.compilations_seen", "90")[-1])
    assert found["before"] == 1 and found["all"] == 4
    assert found["warned_before"] == found["warned_of_known"] == found["warned_of_expected"] == []
    (said,) = found["said"]
    assert said.startswith(f"Triton compiled {KERNEL} while serving") and "\n" not in said
    assert "x_ptr:*fp16%16" in said and "num_rows:i32 " in said and "BLOCK_H=64" in said and "num_warps=4" in said
    assert found["faults"] == [KERNEL]
    # Whose hook was there before hears of all of them.
    assert found["heard"] == [KERNEL, KERNEL, "_somebody_elses_kernel", KERNEL, KERNEL]


def test_another_form_of_the_hooks_event_ends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton's own type says None for constants."""
    monkeypatch.setattr(compilations, "_seen", {})
    kernel = SimpleNamespace(module=f"{compilations.PACKAGE}.norm.triton", name=KERNEL)
    compiled: dict[str, Any] = {"signature": {"x": "i32"}, "constants": None, "configs": [{}]}
    compilations._note({"fn": kernel, "compile": compiled, "repr": "said", "key": "so"})
    assert [(found.kernel, found.specialization) for found in compilations.compiled()] == [(KERNEL, "said so")]
