"""The result files of single operations: merged against this project, and refused where they could flatter."""

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwen3next_plugin.bench.check import check_file
from qwen3next_plugin.bench.kernels.cases import ALL_CASES, family_and_size
from qwen3next_plugin.bench.kernels.check import check_parts
from qwen3next_plugin.bench.kernels.result import merge
from qwen3next_plugin.bench.kernels.session import write_merged
from qwen3next_plugin.bench.tables import table_of
from qwen3next_plugin.errors import SettingsError

ABOUT = {
    "command": "qwen3next bench kernels --peers X",
    "commit": "0123abc",
    "plugin_version": "1.0",
    "gpu": "NVIDIA H200",
    "versions": {"torch": "2.13.0", "triton": "3.7.1"},
    "ceilings": {"copy_gb_s": 4000.0, "bf16_tflop_s": 700.0, "fp8_tflop_s": 1300.0},
}


def series(value: float, **more: Any) -> dict[str, Any]:
    repeats = [value * factor for factor in (0.99, 1.0, 1.01)]
    return {"value": value, "repeats": repeats, "spread": 0.02, "relative_error": 0.002, "timed": "graph", **more}


def row(found: dict[str, Any], **more: Any) -> dict[str, Any]:
    about = {"unit": "us", "work": "a layer", "bytes": 40_000_000, "flops": 10**9, "products": "bf16"}
    return about | {
        "share_of": "own",
        "engine_runs": False,
        "copies": 4,
        "facts": {"state_dtype": "float32"},
        "series": found,
        "done": True,
    } | more  # fmt: skip


def states(kind: str = "kernels") -> list[dict[str, Any]]:
    """Two runs. Bytes allow 10 us."""
    gone = {"value": None, "why": "ImportError: no kernel"}
    vllm = {"own": series(20.0), "plugin": series(25.0), "vllm": series(40.0), "vllm-flashinfer": gone}
    sglang = {"own": series(21.0), "sglang": series(50.0), "sglang-flashinfer": series(30.0)}
    dense = [row({"own": series(18.0), name: series(20.0 + n)}, engine_runs=True) for n, name in enumerate(("vllm", "sglang"))]  # noqa: E501  # fmt: skip
    found = []
    for engine, one, other in (("vllm", vllm, dense[0]), ("sglang", sglang, dense[1])):
        rows = {"gdn-verify4-b64": row(one), "dense-out-m1": other}
        if kind == "moe":
            joined = {name: series(30.0, does="joined") for name in ("plugin", *(["sglang"] * (engine == "sglang")))}
            routed = {"own": series(20.0, does="routed"), **({"vllm": series(35.0, does="routed")} if engine == "vllm" else {})}  # noqa: E501  # fmt: skip
            more = {"useful_flops": 1, "padded_flops": 2, "config": {"block_m": 16}}
            rows = {"moe-fp8-tp1-m8": row(routed | joined, share_of="plugin", facts=more)}
        found.append(
            {"format": 1, "kind": kind, "engine": engine, "machine": "m", "about": ABOUT, "rows": rows, "attempt": None}
        )
    return found


def test_merged_rows_count_what_is_open_against_this_project() -> None:
    result = merge(states())
    assert check_parts(result) == []
    verify, dense = result["rows"]
    assert verify["own"] == 21.0 and verify["plugin"] == 25.0  # the slowest run; the slower of two ways
    assert verify["plugin_is"] == {"vllm": "plugin@vllm", "sglang": "own@sglang"}
    assert verify["stock"] == 40.0 and verify["peer"] == 30.0  # what engines run by themselves; what they have
    assert verify["share_of"] == "own@sglang" and verify["share_of_ceiling"] == pytest.approx(10 / 21, rel=1e-4)
    assert verify["bound_by"] == "bytes" and verify["why"] == {"vllm-flashinfer": "ImportError: no kernel"}
    assert verify["peers"]["vllm-flashinfer"] == {"value": None, "why": "ImportError: no kernel"}
    assert dense["own"] == 18.0 and dense["plugin"] == 21.0 and dense["stock"] == 20.0  # the engine's own layer runs
    assert [run["engine"] for run in result["runs"]] == ["vllm", "sglang"] and "machine" not in json.dumps(result)


def test_experts_with_the_shared_one_are_compared_with_such_alone() -> None:
    result = merge(states("moe"))
    assert check_parts(result) == []
    found = result["rows"][0]
    assert (found["own"], found["stock"]) == (20.0, 35.0) and (found["plugin"], found["stock_joined"]) == (30.0, 30.0)
    assert found["share_of"].startswith("plugin@") and found["padded_flops"] == 2


@pytest.mark.parametrize("key", ["machine", "commit", "gpu", "kind"])
def test_runs_that_do_not_compare_are_not_merged(key: str) -> None:
    first, second = states()
    second["about"] = dict(second["about"])
    (second if key in second else second["about"])[key] = "another"
    with pytest.raises(SettingsError, match=key):
        merge([first, second])
    with pytest.raises(SettingsError, match="two state files are of one engine"):
        merge([first, first])


def test_a_run_alone_gives_a_file_that_says_what_it_lacks() -> None:
    findings = check_parts(merge(states()[:1]))
    assert findings == ["runs: sglang was not run beside it, and may be the faster one."]


def unordered(found: list[dict[str, Any]]) -> set[str]:
    return {case for state in found for case in state["rows"]}


def test_a_case_that_no_run_could_prepare_is_in_the_file_with_its_reason() -> None:
    found = states()
    for state in found:
        state["rows"]["norm-add-1"] = {"series": {"own": {"value": None, "why": "OutOfMemoryError"}}, "done": True}
    result = merge(found)
    unprepared = next(row for row in result["rows"] if row["case"] == "norm-add-1")
    assert [row["case"] for row in result["rows"]] == [
        case for case in ALL_CASES["kernels"] if case in unordered(found)
    ]
    assert unprepared["why"] == {"own@vllm": "OutOfMemoryError", "own@sglang": "OutOfMemoryError"}
    assert any("norm-add-1: unit, work" in finding for finding in check_parts(result))


def first_row(change: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], Any]:
    return lambda result: change(result["rows"][0])


SPOILED: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no commit": (lambda r: r.update(commit=""), "commit is empty"),
    "changes": (lambda r: r.update(commit="0123abc+changes"), "no commit holds"),
    "no rows": (lambda r: r.update(rows=[]), "rows: there is none"),
    "format": (lambda r: r.update(format=7), "format is 7"),
    "an engine left out": (lambda r: r["runs"].pop(0), "vllm was not run beside it"),
    "versions": (lambda r: r["runs"][0].update(versions={}), "versions of torch and triton with vllm"),
    "ceilings": (lambda r: r["runs"][1].update(ceilings={}), "ceilings .* with sglang"),
    "command": (lambda r: r["runs"][1].update(command=""), "the command of sglang"),
    "a key": (first_row(lambda row: row.pop("peers")), "peers missing"),
    "faster own": (first_row(lambda row: row.update(own=20.0)), "own is 20.0, but its slowest run took 21.0"),
    "faster plugin": (first_row(lambda row: row.update(plugin=21.0)), "slowest of what the model runs .* took 25.0"),
    "slower stock": (first_row(lambda row: row.update(stock=50.0)), "fastest engine by itself took 40.0"),
    "slower peer": (first_row(lambda row: row.update(peer=40.0)), "fastest of all took 30.0"),
    "an altered peer": (first_row(lambda row: row["peers"]["vllm"].update(value=99.0)), "vllm is not the median"),
    "no reason": (first_row(lambda row: row["why"].clear()), "neither a value nor a reason"),
    "a peer's run gone": (
        first_row(lambda row: [row["peers"].pop(name) for name in ("vllm", "vllm-flashinfer")]),
        "nothing of vllm is named",
    ),
    "repeats": (first_row(lambda row: row["repeats"].update({"sglang": [50.0]})), "1 repeats of sglang, 3"),
    "own gone": (first_row(lambda row: row["repeats"].pop("own@vllm")), "own was not measured beside vllm"),
    "wrong": (first_row(lambda row: row["relative_error"].update({"own@vllm": 0.3})), "output of own@vllm is 0.3"),
    "NaN": (first_row(lambda row: row["relative_error"].update({"own@vllm": float("nan")})), "own@vllm is nan"),
    "apart": (
        first_row(lambda row: row["repeats"].update({"own@vllm": [10.0, 10.0, 10.0]})),
        "own: 10.0 and 21.0 us in two runs are too far apart",
    ),
    "eager": (first_row(lambda row: row["timed"].update(vllm="eager")), "vllm was launched from Python"),
    "own eager": (first_row(lambda row: row["timed"].update({"own@vllm": "eager"})), "own@vllm was launched from"),
    "share": (first_row(lambda row: row.update(share_of_ceiling=0.9)), "make it 0.47"),
    "beyond": (first_row(lambda row: row.update(bytes=100_000_000, share_of_ceiling=1.19)), "clock are wrong"),
    "no share": (first_row(lambda row: row.update(share_of_ceiling=None)), "share_of_ceiling is missing"),
    "share of what": (first_row(lambda row: row.update(share_of="own@trt")), "'own@trt' was not measured"),
}


@pytest.mark.parametrize("name", SPOILED)
def test_what_could_flatter_is_refused(name: str, tmp_path: Path) -> None:
    change, finding = SPOILED[name]
    result = copy.deepcopy(merge(states()))
    change(result)
    path = tmp_path / "kernels.json"
    path.write_text(json.dumps(result), encoding="utf-8")
    found = "\n".join(check_file(path))
    assert re.search(finding, found), found


def test_files_lie_side_by_side_and_old_ones_stay_out(tmp_path: Path) -> None:
    vllm, sglang = states()
    for state in (vllm, sglang):
        path = tmp_path / f"kernels.{state['engine']}.state.json"
        path.write_text(json.dumps(state), encoding="utf-8")
    result = tmp_path / "kernels.json"
    write_merged(result, "kernels")
    assert check_file(result) == []
    (tmp_path / "kernels.sglang.state.json").write_text(json.dumps(sglang | {"machine": "new"}), encoding="utf-8")
    write_merged(result, "kernels")
    assert [run["engine"] for run in json.loads(result.read_text(encoding="utf-8"))["runs"]] == ["sglang"]


def test_cases_of_a_family_are_one_line() -> None:
    assert family_and_size("gdn-decode-b64") == ("gdn-decode", 64)
    assert family_and_size("gdn-decode-b64-bf16state") == ("gdn-decode-bf16state", 64)
    assert family_and_size("gdn-prefill-4x8192") == ("gdn-prefill-4", 8192)
    assert family_and_size("moe-fp8-tp1-m8") == ("moe-fp8-tp1", 8)
    assert family_and_size("norm-add-64") == ("norm-add", 64)


def test_a_picture_comes_of_it(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    from qwen3next_plugin.bench.plot import plot_result

    path = tmp_path / "moe.json"
    path.write_text(json.dumps(merge(states("moe"))), encoding="utf-8")
    assert plot_result(path).stat().st_size > 1000


@pytest.mark.parametrize("kind", ["kernels", "moe"])
def test_a_table_comes_of_it(kind: str) -> None:
    lines = table_of(merge(states(kind))).splitlines()
    assert (
        lines[2]
        == {
            "kernels": "| gdn-verify4-b64 | 40 us | 25 us | 1.60x | 50 us | 21 us | 2.38x | 48% |",
            "moe": "| moe-fp8-tp1-m8 | 35 us | 20 us | 1.75x | 30 us | 30 us | 1.00x | 33% |",
        }[kind]
    )
    assert "NVIDIA H200" in lines[-1] and "copy 4000 GB/s" in lines[-1]
