"""What the doctor is told of SGLang, by a process that loads plugins as SGLang's own do."""

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwen3next_plugin import sglang_integration
from qwen3next_plugin.sglang_integration.inquiry import NAME, ask

CASES: dict[str, dict[str, str]] = {
    "as installed": {},
    "filtered out": {"SGLANG_PLUGINS": "another"},
}


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    folder = tmp_path_factory.mktemp("inquiry")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(CASES, pool.map(lambda variables: inquire(variables, folder), CASES.values()), strict=True))


def inquire(variables: dict[str, str], folder: Path) -> dict[str, str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("QWEN3NEXT_")} | variables
    done = subprocess.run(
        [sys.executable, "-m", NAME], env=environment, cwd=folder, capture_output=True, text=True, timeout=400
    )
    name, _, answer = done.stdout.splitlines()[-1].partition(" ")
    assert (name, done.returncode) == (NAME, 0), done.stderr
    return dict(json.loads(answer))


def test_the_plugin_is_active(answers: dict[str, dict[str, str]]) -> None:
    found = "qwen3next_plugin.sglang_integration.model:Qwen3NextForCausalLM"
    assert answers["as installed"] == {"kind": "active", "found": found}


def test_sglangs_own_variable_may_leave_it_out(answers: dict[str, dict[str, str]]) -> None:
    assert answers["filtered out"]["kind"] == "stock"
    assert answers["filtered out"]["found"].startswith("sglang.srt.models.qwen3_next:Qwen3NextForCausalLM")
    assert "SGLANG_PLUGINS=another" in answers["filtered out"]["found"]


def test_a_refusal_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sglang.srt.plugins.load_plugins", sglang_integration.register)
    monkeypatch.delenv("QWEN3NEXT_PLUGIN", raising=False)
    monkeypatch.setenv("QWEN3NEXT_ROPE", "yarn")
    answer = ask()
    assert answer["kind"] == "refused" and "QWEN3NEXT_ROPE is 'yarn'" in answer["found"]
