"""Whole runs of `qwen3next bench` against a stand-in for the engine: order, resuming, results, checks."""

import copy
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tokenizers import Tokenizer
from typer.testing import CliRunner

from qwen3next_plugin.bench import ceilings, prebuild
from qwen3next_plugin.bench.check import check_file, check_result, result_files
from qwen3next_plugin.bench.profile import Launch, summarize
from qwen3next_plugin.bench.tables import rewrite
from qwen3next_plugin.cli import app
from qwen3next_plugin.errors import PluginError, SettingsError

from .conftest import ROWS, Bench


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory, bench: Bench) -> dict[str, Any]:
    directory = tmp_path_factory.mktemp("run")
    done = bench(directory)
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    (file,) = result_files([directory / "results"])
    assert check_file(file) == []
    found: dict[str, Any] = json.loads(file.read_text())
    return found


def test_every_token_has_a_text(model: Path) -> None:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    size = json.loads((model / "config.json").read_text())["vocab_size"]
    assert all(tokenizer.decode([i], skip_special_tokens=False) for i in range(size))
    assert tokenizer.token_to_id("<|im_end|>") == 258
    assert tokenizer.decode([300, 301]) == " t300 t301"
    assert tokenizer.encode("t300 t301").ids == list(b"t300 t301")


def test_ceilings_are_measured() -> None:
    found = ceilings.measure_ceilings()
    assert found["versions"]["torch"]
    assert found["ceilings"]["copy_gb_s"] > 0.1
    assert found["ceilings"]["bf16_tflop_s"] > 0


def test_sides_take_turns_and_are_timed_alike(result: dict[str, Any]) -> None:
    rows = {row["case"]: row for row in result["rows"]}
    assert set(rows) == set(ROWS.split(","))
    assert 3.5 < rows["decode-b3"]["stock"] < 30
    assert 1.5 < rows["decode-b3"]["plugin"] < rows["decode-b3"]["stock"]
    assert len(rows["decode-b1"]["repeats"]["stock-vllm"]) == 6, "two visits of three repeats"
    assert len(rows["decode-b1"]["repeats"]["plugin-vllm"]) == 3
    assert rows["decode-b1"]["stock"] == rows["decode-b1"]["stock_vllm"]
    assert rows["decode-b1"]["stock_sglang"] is None
    assert rows["decode-b1"]["client_ms"]["stock-vllm"] == pytest.approx(rows["decode-b1"]["stock"], rel=0.5)
    assert len(rows["warm-start"]["repeats"]["plugin-vllm"]) == 1
    visits = [v for side in result["sides"].values() for entry in side["timed"] for v in entry["visits"]]
    assert sorted(visits) == ["0:vllm-1-stock", "0:vllm-2-plugin", "0:vllm-3-stock", "0:vllm-4-plugin"]
    assert set(result["relative_logit_error"]) == {"plugin-vllm", "stock-vllm"}


def _change(result: dict[str, Any], change: str) -> dict[str, Any]:
    """The result with one thing wrong."""
    wrong = copy.deepcopy(result)
    plugin = wrong["sides"]["plugin-vllm"]["timed"][0]
    row = next(row for row in wrong["rows"] if row["case"] == "decode-b3")
    match change:
        case "a flag":
            plugin["arguments"].append("--enable-prefix-caching")
        case "a flag's value":
            plugin["arguments"][plugin["arguments"].index("--max-num-seqs") + 1] = "999"
        case "a variable":
            plugin["environment"]["VLLM_USE_SOMETHING"] = "1"
        case "state dtype":
            plugin["facts"]["ssm_state_dtype"] = "torch.float16"
        case "stock was the plugin":
            wrong["sides"]["stock-vllm"]["timed"][0]["facts"]["model_class"] = "qwen3next_plugin.model"
        case "experts":
            row["distinct_experts"]["plugin-vllm"] *= 0.97
        case "experts unknown":
            row["distinct_experts"] = {}
        case "repeats":
            row["repeats"]["plugin-vllm"] = row["repeats"]["plugin-vllm"][:2]
        case "slower stock":
            row["stock_sglang"] = row["stock"] / 2
        case "below the floor":
            row["floor"] = row["plugin"] * 2
        case "a field":
            del row["spread"]
        case "no commit":
            wrong["commit"] = None
        case "uncommitted":
            wrong["commit"] += "+changes"
        case "ceilings":
            wrong["sessions"][0]["engines"]["vllm"]["ceilings"]["copy_gb_s"] = None
        case "logits":
            wrong["relative_logit_error"] = {}
        case "one side":
            del wrong["sides"]["stock-vllm"]
    return wrong


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("a flag", "arguments differ: --enable-prefix-caching"),
        ("a flag's value", "arguments differ: 999"),
        ("a variable", "environment differs: VLLM_USE_SOMETHING"),
        ("state dtype", "facts differ: ssm_state_dtype"),
        ("stock was the plugin", "the stock side ran the plugin's model"),
        ("experts", "more than 2 % apart"),
        ("experts unknown", "not counted on both sides"),
        ("repeats", "2 repeats of plugin-vllm"),
        ("slower stock", "stock is not the faster"),
        ("below the floor", "faster than the floor"),
        ("a field", "spread missing"),
        ("no commit", "commit is empty"),
        ("uncommitted", "commit: the checkout had changes"),
        ("ceilings", "ceilings"),
        ("logits", "was not compared with the oracle"),
        ("one side", "stock-vllm was not measured"),
    ],
)
def test_a_result_that_could_flatter_is_refused(result: dict[str, Any], change: str, says: str) -> None:
    findings = check_result(_change(result, change))
    assert any(says in finding for finding in findings), findings


def test_the_command_refuses_with_a_sentence_and_a_code(result: dict[str, Any], tmp_path: Path) -> None:
    file = tmp_path / "wrong.json"
    file.write_text(json.dumps(_change(result, "a flag")))
    done = CliRunner().invoke(app, ["bench", "check", str(file)])
    assert done.exit_code == 1
    assert "arguments differ" in done.output


PROFILE = summarize([Launch("fused_moe_kernel", 0.0, 10.0)], steps=1, layers=1)


def test_tables_are_made_from_files(result: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(json.dumps(result))
    document = tmp_path / "README.md"
    document.write_text("before\n<!-- bench: r.json -->\nSTALE\n<!-- /bench -->\nafter\n")
    run = CliRunner().invoke
    assert run(app, ["bench", "tables", "--check", str(document)]).exit_code == 1
    assert run(app, ["bench", "tables", str(document)]).exit_code == 0
    assert run(app, ["bench", "tables", "--check", str(document)]).exit_code == 0
    text = document.read_text()
    plugin = next(row["plugin"] for row in result["rows"] if row["case"] == "decode-b3")
    assert f"{plugin:.3g} ms" in text
    assert "STALE" not in text
    assert text.startswith("before")
    assert text.endswith("after\n")
    (tmp_path / "p.json").write_text(json.dumps({"profiles": {"decode-b1": {"stock-vllm": PROFILE}}}))
    profiles = rewrite("<!-- profiles: p.json -->\nSTALE\n<!-- /bench -->", tmp_path)
    assert "`decode-b1`, one step:\n\n| part | stock-vllm |" in profiles
    assert "STALE" not in profiles
    with pytest.raises(SettingsError, match="gone.json"):
        rewrite("<!-- bench: gone.json -->\n<!-- /bench -->", tmp_path)


def test_profiles_are_made_after_the_rows(tmp_path: Path, bench: Bench) -> None:
    few = ("--rows", "decode-b2", "--no-evidence", "--order", "A-B", "--profile", "decode-b2,prefill-64")
    done = bench(tmp_path, *few)
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    (file,) = result_files([tmp_path / "results"])
    result = json.loads(file.read_text())
    assert [row["case"] for row in result["rows"]] == ["decode-b2"]
    assert {name: sorted(sides) for name, sides in result["profiles"].items()} == {
        "decode-b2": ["plugin-vllm", "stock-vllm"],
        "prefill-64": ["plugin-vllm", "stock-vllm"],
    }
    assert result["profiles"]["decode-b2"]["plugin-vllm"]["steps"] == 16
    assert "launches a layer" in done.output


def test_time_that_is_up_begins_nothing(tmp_path: Path, bench: Bench) -> None:
    done = bench(tmp_path, "--no-evidence", "--minutes", "0")
    assert done.exit_code == 0
    assert "same command again" in done.output
    assert json.loads((tmp_path / "results" / "try.state.json").read_text())["sessions"][0]["visits"] == {}


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--rows", "decode-256"], "--rows: 'decode-256'"),
        (["--rows", "traffic-0"], "--rows: 'traffic-0'"),
        (["--engine", "trt"], "--engine: 'trt'"),
        (["--order", "A-C"], "--order: 'A-C'"),
        (["--against", "peers"], "--against: 'peers'"),
        (["--model", "/nowhere"], "--model"),
        (["--profile", "cold-start"], "--profile: 'cold-start'"),
    ],
)
def test_what_makes_no_sense_is_said_at_once(tmp_path: Path, bench: Bench, given: list[str], says: str) -> None:
    done = bench(tmp_path, *given)
    assert isinstance(done.exception, PluginError)
    assert says in str(done.exception)


def test_what_takes_a_compiler_minutes_is_built_once_beforehand(tmp_path: Path, bench: Bench) -> None:
    """For both sides, but not where their starts are measured."""
    done = bench(tmp_path, "--rows", "decode-b1", "--order", "A-B", "--repeats", "1")
    assert done.exit_code == 0, f"{done.output} {done.exception!r}"
    built = list((tmp_path / "work" / "caches").glob("*/prebuilt"))
    assert [(path.parent.name, path.read_text()) for path in built] == [("vllm", "vllm None")]
    assert (tmp_path / "work" / "prebuild" / "vllm" / "log").read_text() == ""
    starts = tmp_path / "starts"
    bench(starts, "--rows", "cold-start", "--order", "A-B", "--repeats", "1")
    assert list((starts / "work" / "caches").iterdir()) and not list((starts / "work" / "caches").glob("*/prebuilt"))


def test_builders_build_nothing_where_there_is_nothing_to_build(monkeypatch: pytest.MonkeyPatch) -> None:
    built: list[str] = []

    def module(name: str, error: Exception | None = None) -> SimpleNamespace:
        def build_and_load() -> None:
            built.append(name)
            if error is not None:
                raise error

        return SimpleNamespace(name=name, build_and_load=build_and_load)

    monkeypatch.setenv("FLASHINFER_CUDA_ARCH_LIST", "9.0a")
    assert list(prebuild.modules("vllm", "8.0")) == []
    monkeypatch.setitem(sys.modules, "flashinfer.jit.gemm", None)
    assert list(prebuild.modules("vllm", "9.0")) == list(prebuild.modules("sglang", "9.0")) == []
    both = [module("broken", RuntimeError("no compiler")), module("whole")]
    monkeypatch.setattr(prebuild, "modules", lambda *_: both)
    prebuild.main("vllm", "9.0")
    assert built == ["broken", "whole"]
