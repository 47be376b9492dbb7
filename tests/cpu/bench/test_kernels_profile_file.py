"""Profiles in result files: merged by run, and refused where they cannot be of what was timed."""

import json
import re
from collections.abc import Callable
from typing import Any

import pytest

from qwen3next_plugin.bench.kernels.check import check_parts
from qwen3next_plugin.bench.kernels.result import merge

from .test_kernels_file import row, series, states

PROFILE = {
    "kernels": [{"name": "_first", "us": 0.5, "launches": 1.0}, {"name": "_last", "us": 0.25, "launches": 1.0}],
    "us": 0.75,
}


def with_profiles() -> dict[str, Any]:
    """A result whose first row has own series of 20 and 21 us, and no profile in the second run's plugin."""
    vllm, sglang = states()
    vllm["rows"]["gdn-verify4-b64"]["profile"] = {"own": PROFILE, "plugin": {"why": "RuntimeError: no CUPTI"}}
    sglang["rows"]["gdn-verify4-b64"]["profile"] = {"own": PROFILE}
    result: dict[str, Any] = json.loads(json.dumps(merge([vllm, sglang])))  # nothing in it is shared
    return result


def test_merged_profiles_say_which_run_they_are_of() -> None:
    result = with_profiles()
    assert check_parts(result) == []
    why = {"why": "RuntimeError: no CUPTI"}
    assert result["rows"][0]["profile"] == {"own@vllm": PROFILE, "plugin@vllm": why, "own@sglang": PROFILE}
    assert "profile" not in result["rows"][1]
    del result["rows"][0]["profile"]
    assert result == merge(states())


def kernel(**more: Any) -> Callable[[dict[str, Any]], None]:
    return lambda found: found["own@vllm"]["kernels"][1].update(more)


def lasting(us: float) -> Callable[[dict[str, Any]], None]:
    one = {"kernels": [{"name": "_only", "us": us, "launches": 1.0}], "us": us}
    return lambda found: found.update({"own@vllm": one})


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no microseconds": (kernel(us=None), "own@vllm has no kernels, or one without"),
    "NaN": (kernel(us=float("nan")), "own@vllm has no kernels, or one without"),
    "infinite": (kernel(us=float("inf")), "own@vllm has no kernels, or one without"),
    "nothing": (kernel(us=0.0), "own@vllm has no kernels, or one without"),
    "negative": (kernel(us=-1.0), "own@vllm has no kernels, or one without"),
    "no name": (kernel(name=""), "own@vllm has no kernels, or one without"),
    "no launches": (kernel(launches=0.0), "own@vllm has no kernels, or one without"),
    "no kernels": (lambda found: found["own@vllm"].update(kernels=[]), "own@vllm has no kernels"),
    "neither kernels nor a reason": (lambda found: found["plugin@vllm"].clear(), "plugin@vllm has no kernels"),
    "an altered sum": (lambda found: found["own@vllm"].update(us=0.5), "own@vllm is 0.5 us, but its kernels take 0.75"),
    "no sum": (lambda found: found["own@vllm"].pop("us"), "own@vllm is None us"),
    "too long": (lasting(40.1), "the kernels of own@vllm take 40.1 us, and its repeats 20.0 us"),
    "of nothing": (lambda found: found.update({"kernels@vllm": PROFILE}), "kernels@vllm was not timed"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_malformed_profile_is_refused(name: str) -> None:
    change, finding = SPOILED[name]
    result = with_profiles()
    change(result["rows"][0]["profile"])
    found = check_parts(result)
    assert len(found) == 1 and re.search(f"^gdn-verify4-b64: profile: .*{re.escape(finding)}", found[0]), found


def test_kernels_that_overlap_may_take_longer_than_the_row() -> None:
    result = with_profiles()
    lasting(29.9)(result["rows"][0]["profile"])
    assert check_parts(result) == []


def test_kernels_in_microseconds_stand_beside_rows_in_milliseconds() -> None:
    for us, findings in ((39.9, []), (40.1, ["take 40.1 us, and its repeats 0.02 ms."])):
        found = states()
        for state in found:
            one = row({"own": series(0.02), state["engine"]: series(0.04)}, unit="ms")
            state["rows"] = {"gdn-prefill-1x4096": one}
        one = found[0]["rows"]["gdn-prefill-1x4096"]
        one["profile"] = {"own": {"kernels": [{"name": "_only", "us": us, "launches": 1.0}], "us": us}}
        assert [text.partition("own@vllm ")[2] for text in check_parts(merge(found))] == findings
