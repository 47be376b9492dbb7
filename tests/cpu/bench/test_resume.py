"""Runs of `qwen3next bench` that ended before their end and are taken up again, here or on another machine."""

import json
from pathlib import Path

import pytest

from qwen3next_plugin.bench import ceilings
from qwen3next_plugin.bench.check import check_file, result_files
from qwen3next_plugin.bench.client import BenchError
from qwen3next_plugin.errors import PluginError

from .conftest import Bench


def test_a_run_that_ended_is_taken_up_again(tmp_path: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    few = ("--rows", "decode-b2,prefill-128", "--no-evidence", "--order", "A-B")
    monkeypatch.setenv("FAKE_DIE", "plugin")
    done = bench(tmp_path, *few)
    assert isinstance(done.exception, BenchError)
    state = json.loads((tmp_path / "results" / "try.state.json").read_text())
    before = state["sessions"][0]["visits"]
    assert len(before["vllm-1-stock"]["rows"]["prefill-128"]) == 3
    assert not any(before.get("vllm-2-plugin", {"rows": {}})["rows"].values()), "the plugin's engine died"

    monkeypatch.delenv("FAKE_DIE")
    done = bench(tmp_path, *few)
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    after = json.loads((tmp_path / "results" / "try.state.json").read_text())["sessions"][0]["visits"]
    assert len(after["vllm-2-plugin"]["rows"]["prefill-128"]) == 3
    assert after["vllm-1-stock"] == before["vllm-1-stock"], "what was measured is not measured again"

    done = bench(tmp_path, *few[:-1], "A-B-A")
    assert isinstance(done.exception, PluginError)
    assert "another order" in str(done.exception)


def test_another_machine_measures_both_sides_anew(tmp_path: Path, bench: Bench) -> None:
    few = ("--rows", "decode-b2", "--no-evidence", "--order", "A-B")
    bench(tmp_path, *few)
    file = tmp_path / "results" / "try.state.json"
    state = json.loads(file.read_text())
    elsewhere = state["sessions"][0]
    elsewhere["machine"] = "another"
    del elsewhere["visits"]["vllm-2-plugin"]  # it was taken away before the plugin's turn
    elsewhere["visits"]["vllm-1-stock"]["rows"]["decode-b2"] = [{"value": 1e-3, "steps": 20, "client": None}] * 3
    file.write_text(json.dumps(state))
    bench(tmp_path, *few)
    state = json.loads(file.read_text())
    assert [session["machine"] for session in state["sessions"]] == ["another", ceilings.machine_id()]
    assert list(state["sessions"][1]["visits"]) == ["vllm-1-stock", "vllm-2-plugin"]
    (result,) = result_files([tmp_path / "results"])
    row = json.loads(result.read_text())["rows"][0]
    assert row["session"] == 1
    assert row["stock"] > 1, "sides of two machines are never compared"


def test_counts_and_profiles_may_come_from_another_machine(tmp_path: Path, bench: Bench) -> None:
    few = ("--rows", "decode-b2", "--order", "A-B", "--profile", "decode-b2")
    assert bench(tmp_path, *few).exit_code == 0
    file = tmp_path / "results" / "try.state.json"
    state = json.loads(file.read_text())
    elsewhere = state["sessions"][0]
    elsewhere["machine"] = "another"
    del elsewhere["visits"]["vllm-evidence-stock"]  # it was taken away before that, and before this profile
    del elsewhere["visits"]["vllm-1-stock"]["rows"]["profile-decode-b2"]
    file.write_text(json.dumps(state))
    assert bench(tmp_path, *few).exit_code == 0
    here = json.loads(file.read_text())["sessions"][1]["visits"]
    assert {name: list(visit["rows"]) for name, visit in here.items()} == {
        "vllm-1-stock": ["profile-decode-b2"],
        "vllm-evidence-stock": [],
    }
    (result,) = result_files([tmp_path / "results"])
    assert check_file(result) == []
    content = json.loads(result.read_text())
    assert [row["session"] for row in content["rows"]] == [0]
    assert sorted(content["rows"][0]["distinct_experts"]) == ["plugin-vllm", "stock-vllm"]
    assert sorted(content["profiles"]["decode-b2"]) == ["plugin-vllm", "stock-vllm"]
