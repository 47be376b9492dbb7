"""Rows profiled once all are timed: launches fold into calls, and a run that loses something goes on where it was."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from qwen3next_plugin.bench.kernels import launches, session
from qwen3next_plugin.bench.kernels.both import run_both
from qwen3next_plugin.bench.kernels.cases import profiled_among
from qwen3next_plugin.bench.kernels.launches import by_kernel, profile_cases, profiled_launches
from qwen3next_plugin.bench.kernels.measure import GpuLostError, Run
from qwen3next_plugin.bench.kernels.state import DIED, PartState
from qwen3next_plugin.bench.kernels.timing import Times
from qwen3next_plugin.bench.kernels.work import Call, Work
from qwen3next_plugin.bench.profile import NAME_CHARACTERS, Launch
from qwen3next_plugin.cli import app
from qwen3next_plugin.errors import SettingsError

from .test_kernels import BUILD, CPU, SPEC, Clock, as_own, case_of, run_on, with_peers
from .test_kernels_both import request
from .test_kernels_file import ABOUT
from .test_kernels_profile_file import PROFILE


class Log(Clock):
    """A clock and a profiler in one, which note in ``did`` what was asked of either."""

    def __init__(self) -> None:
        super().__init__()
        self.did: list[str] = []
        self.fails: BaseException | None = None

    def __call__(self, calls: Sequence[Call]) -> Times:
        self.did.append("time")
        return super().__call__(calls)

    def profile(self, calls: Sequence[Call]) -> tuple[list[Launch], int]:
        self.did.append("profile")
        if self.fails is not None:
            raise self.fails
        starts = range(len(calls))
        found = [(Launch("_first", 2.0 * at, 0.5), Launch("_last", 2.0 * at + 1, 0.25)) for at in starts]
        return [launch for pair in found for launch in pair], len(calls)


def profiles_on(path: Path, log: Log, *names: str, deadline: float | None = None, **more: Any) -> dict[str, Any]:
    """The rows of a state after these cases' profiles."""
    state = PartState(path, {"kind": "kernels", "engine": "vllm"}, "a machine")
    run = Run(state, SPEC, "vllm", CPU, log, more.get("build", BUILD))
    run.said = more.get("said", lambda text: None)
    profile_cases(run, [case_of(name) for name in names], log.profile, deadline, more.get("after", lambda: None))
    return json.loads(path.read_text(encoding="utf-8"))["rows"]


@pytest.fixture
def timed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A state in which two rows are timed, of one and of two own series."""
    with_peers(monkeypatch, vllm=as_own)
    path = tmp_path / "s.json"
    run_on(path, "vllm", Clock(), ["norm-add-5", "moe-fp8-tp1-m3"])
    return path


def without_profiles(rows: dict[str, Any]) -> dict[str, Any]:
    return {name: {key: value for key, value in row.items() if key != "profile"} for name, row in rows.items()}


def named(*names: str, us: Sequence[float] = (1.0,)) -> list[Launch]:
    return [Launch(name, float(at), us[at % len(us)]) for at, name in enumerate(names)]


def test_two_launches_of_one_kernel_in_a_call_are_told_apart_by_their_place() -> None:
    found = by_kernel(named(*("_grouped", "_act", "_grouped") * 4, us=(4.0, 1.0, 2.0)), 4)
    assert [(one["name"], one["us"]) for one in found["kernels"]] == [
        ("_grouped", 4.0),
        ("_act", 1.0),
        ("_grouped", 2.0),
    ]
    assert [one["launches"] for one in found["kernels"]] == [1.0] * 3 and found["us"] == 7.0
    mean = by_kernel(named("_one", "_one", us=(1.0, 4.0)), 2)
    assert mean == {"kernels": [{"name": "_one", "us": 2.5, "launches": 1.0}], "us": 2.5}


@pytest.mark.parametrize(
    ("names", "launched"),
    [
        (("_a", "_b", "Memcpy DtoH", "_a", "_b"), {"_a": 1.0, "_b": 1.0, "Memcpy DtoH": 0.5}),  # no multiple of calls
        (("_long", "_a", "_a", "_long"), {"_long": 1.0, "_a": 1.0}),  # a multiple, in another order
        (("_a",) * 5, {"_a": 2.5}),  # of one name, and no multiple
    ],
)
def test_calls_that_differ_are_folded_by_name(names: tuple[str, ...], launched: dict[str, float]) -> None:
    found = by_kernel([Launch(name, float(at), float(len(name))) for at, name in enumerate(names)], 2)
    assert {one["name"]: one["launches"] for one in found["kernels"]} == launched
    assert all(one["us"] == len(one["name"]) * one["launches"] for one in found["kernels"])
    assert list(launched) == [one["name"] for one in found["kernels"]], "not in the order of launch"
    assert found["us"] == sum(map(len, names)) / 2


def test_long_names_are_cut_and_nothing_launched_is_an_error() -> None:
    assert by_kernel(named("k" * 1000), 1)["kernels"][0]["name"] == "k" * NAME_CHARACTERS
    with pytest.raises(RuntimeError, match="saw nothing run"):
        by_kernel([], 3)


def test_this_projects_series_are_profiled_and_no_others(timed: Path) -> None:
    before, log, said = json.loads(timed.read_text())["rows"], Log(), list[str]()
    rows = profiles_on(timed, log, "norm-add-5", "moe-fp8-tp1-m3", said=said.append)
    assert set(before["norm-add-5"]["series"]) == {"own", "vllm"}
    assert rows["norm-add-5"]["profile"] == {"own": PROFILE}
    assert rows["moe-fp8-tp1-m3"]["profile"] == {"own": PROFILE, "plugin": PROFILE}
    assert without_profiles(rows) == before and log.did == ["profile"] * 3
    assert said[0] == "norm-add-5, in kernels: own 0.75 us"


def test_profiles_go_on_where_they_were(timed: Path) -> None:
    log, behind = Log(), list[int]()
    profiles_on(timed, log, "norm-add-5", after=lambda: behind.append(len(log.did)))
    profiles_on(timed, log, "norm-add-5", "moe-fp8-tp1-m3", after=lambda: behind.append(len(log.did)))
    assert log.did == ["profile"] * 3 and behind == [1, 3]
    profiles_on(timed, log, "norm-add-5", "moe-fp8-tp1-m3", build=None)
    assert len(log.did) == 3, "a row that has a profile was made again"


def test_no_profile_begins_behind_the_deadline(timed: Path) -> None:
    log, said = Log(), list[str]()
    rows = profiles_on(timed, log, "norm-add-5", deadline=0.0, said=said.append)
    assert not log.did and "profile" not in rows["norm-add-5"] and "time is up" in said[0]
    profiles_on(timed, log, "norm-add-5")
    profiles_on(timed, log, "norm-add-5", deadline=0.0, said=said.append)
    assert len(said) == 1, "it asks to be run again though nothing is left to do"


def test_an_error_is_kept_and_costs_nothing_else(timed: Path) -> None:
    before, log = json.loads(timed.read_text())["rows"], Log()
    log.fails = RuntimeError("CUPTI is\n  taken")
    rows = profiles_on(timed, log, "norm-add-5")
    log.fails = None
    assert rows["norm-add-5"]["profile"] == {"own": {"why": "RuntimeError: CUPTI is taken"}}

    def build(*arguments: Any) -> Work:
        raise torch.cuda.OutOfMemoryError("out of memory")

    rows = profiles_on(timed, log, "norm-add-5", "moe-fp8-tp1-m3", build=build)
    why = {"why": "OutOfMemoryError: out of memory"}
    assert rows["moe-fp8-tp1-m3"]["profile"] == {"own": why, "plugin": why}
    assert without_profiles(rows) == before and log.did == ["profile"]


def test_what_was_not_timed_is_not_profiled(timed: Path) -> None:
    state = json.loads(timed.read_text())
    state["rows"]["moe-fp8-tp1-m3"]["series"]["own"] = {"value": None, "why": DIED}
    state["rows"]["norm-add-6"] = {"series": {"own": {"value": None, "why": "OutOfMemoryError"}}, "done": True}
    timed.write_text(json.dumps(state))
    rows = profiles_on(timed, Log(), "norm-add-6", "norm-add-7", "moe-fp8-tp1-m3")
    assert rows["moe-fp8-tp1-m3"]["profile"] == {"plugin": PROFILE}
    assert "profile" not in rows["norm-add-6"] and "norm-add-7" not in rows


def test_what_killed_the_process_in_a_profile_is_passed_by(timed: Path) -> None:
    log = Log()
    log.fails = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        profiles_on(timed, log, "moe-fp8-tp1-m3")
    log.fails = None
    rows = profiles_on(timed, log, "moe-fp8-tp1-m3")
    assert rows["moe-fp8-tp1-m3"]["profile"] == {"own": {"why": DIED}, "plugin": PROFILE}


def test_a_gpu_lost_in_a_profile_ends_the_run_with_a_word(timed: Path) -> None:
    log = Log()
    log.lost, log.fails = True, RuntimeError("illegal memory access")
    with pytest.raises(GpuLostError, match="a profile of own in moe-fp8-tp1-m3: run the same command again"):
        profiles_on(timed, log, "moe-fp8-tp1-m3", "norm-add-5")
    log.lost, log.fails = False, None
    rows = profiles_on(timed, log, "moe-fp8-tp1-m3", "norm-add-5")
    why = {"why": "RuntimeError: illegal memory access"}
    assert rows["moe-fp8-tp1-m3"]["profile"] == {"own": why, "plugin": PROFILE}


def test_names_and_patterns_are_of_the_rows_that_are_run() -> None:
    names = ["norm-add-5", "norm-add-1", "moe-fp8-tp1-m3"]
    assert profiled_among(names, "") == []
    assert profiled_among(names, "all") == names
    assert profiled_among(names, " moe-* , norm-add-5,moe-fp8-tp1-m3") == ["norm-add-5", "moe-fp8-tp1-m3"]
    for text in ("norm-add-64", "moe-*,gdn-*"):
        with pytest.raises(SettingsError, match="--profile: .* fits none of the rows that are run"):
            profiled_among(names, text)


@pytest.fixture
def log(monkeypatch: pytest.MonkeyPatch) -> Log:
    """What `qwen3next bench kernels` asks of a machine that is not there."""
    log = Log()
    monkeypatch.setattr(session, "_timer", lambda kind: log)
    monkeypatch.setattr(session, "_device", lambda: CPU)
    monkeypatch.setattr(session, "_spec", lambda: SPEC)
    monkeypatch.setattr(session, "_about", lambda commit: {**ABOUT, "commit": commit})
    monkeypatch.setattr(session, "this_machine", lambda: "a machine")
    monkeypatch.setattr(session, "profiled_launches", log.profile)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    with_peers(monkeypatch, vllm=as_own)
    return log


def bench(out: Path, *words: str) -> Any:
    return CliRunner().invoke(app, ["bench", *words, "--peers", "vllm", "--out", str(out), "--commit", "a1"])


def test_the_command_times_all_rows_before_it_profiles_the_first(tmp_path: Path, log: Log) -> None:
    rows = ("--rows", "norm-add-5,norm-add-6,qk-norm-rope-write-7")
    done = bench(tmp_path, "kernels", *rows, "--profile", "norm-*")
    assert done.exit_code == 0, done.output
    assert log.did == ["time"] * 6 + ["profile"] * 2
    result = json.loads((tmp_path / "h200" / "kernels.json").read_text())
    found = {row["case"]: row.get("profile") for row in result["rows"]}
    one = {"own@vllm": PROFILE}
    assert found == {"norm-add-5": one, "norm-add-6": one, "qk-norm-rope-write-7": None}
    # Another row and another profile, in another process: again the time comes first, and nothing twice.
    log.did.clear()
    assert bench(tmp_path, "kernels", rows[0], f"{rows[1]},norm-add-8", "--profile", "all").exit_code == 0
    assert log.did == ["time"] * 2 + ["profile"] * 2
    assert bench(tmp_path, "moe", "--rows", "moe-fp8-tp1-m3", "--profile", "moe-*").exit_code == 0
    assert log.did[4:] == ["time"] * 3 + ["profile"] * 2


def test_a_profile_of_a_row_that_is_not_run_is_refused_before_anything_is_timed(tmp_path: Path, log: Log) -> None:
    for kind, rows in (("kernels", "norm-add-5"), ("moe", "moe-fp8-tp1-m3")):
        done = bench(tmp_path, kind, "--rows", rows, "--profile", "norm-add-64")
        assert isinstance(done.exception, SettingsError) and "'norm-add-64' fits none" in str(done.exception)
    assert not log.did and not list(tmp_path.iterdir())


def test_both_passes_profiles_to_the_runs_that_measure_by_kind(tmp_path: Path) -> None:
    asked = request(tmp_path, "norm-add-*,moe-fp8-tp1-m1,moe-fp8-tp1-m2")
    run_both(replace(asked, profile="moe-*,norm-add-64"))
    lines = [line for line in (tmp_path / "asked").read_text().splitlines() if line.startswith("begin")]
    wanted = {"kernels": "norm-add-64", "moe": "moe-fp8-tp1-m1,moe-fp8-tp1-m2"}
    assert {"--rehearse" in line for line in lines} == {True, False}
    for words in map(str.split, lines):
        given = words[words.index("--profile") + 1] if "--profile" in words else None
        assert given == (None if "--rehearse" in words else wanted[words[2]])


def test_both_refuses_a_profile_of_no_row_before_anything_is_started(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--profile: 'moe-.' fits none"):
        run_both(replace(request(tmp_path, "norm-add-*"), profile="norm-*,moe-*"))
    assert not (tmp_path / "asked").exists()


class FakeProfiler:
    """torch.profiler's, of a GPU on which every replay of "graph" launches two kernels and a copy a call."""

    def __init__(self, activities: Sequence[torch.profiler.ProfilerActivity]) -> None:
        assert list(activities) == [torch.profiler.ProfilerActivity.CUDA]
        self.open = False

    def __enter__(self) -> "FakeProfiler":
        self.open, FakeProfiler.events = True, []
        return self

    def __exit__(self, *error: object) -> None:
        self.open = False

    def export_chrome_trace(self, path: str) -> None:
        assert not self.open
        Path(path).write_text(json.dumps({"traceEvents": self.events[::-1]}), encoding="utf-8")

    events: list[dict[str, Any]] = []

    @classmethod
    def replay(cls) -> None:
        kinds = {
            "_first": "kernel",
            "Memcpy DtoD (Device -> Device)": "gpu_memcpy",
            "_last": "kernel",
            "aten::mm": "cpu_op",
        }
        for _ in range(2):
            for name, cat in kinds.items():
                cls.events.append({"ph": "X", "cat": cat, "name": name, "ts": len(cls.events), "dur": 0.5})


def test_calls_are_profiled_as_they_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launches, "launcher", lambda calls: (FakeProfiler.replay, "graph"))
    monkeypatch.setattr(launches, "times_a_repeat", lambda action: 3)
    monkeypatch.setattr(launches, "profile", FakeProfiler)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found, calls = profiled_launches([lambda: torch.empty(0)] * 2)
    assert calls == 6 and len(found) == 18
    assert [one["name"] for one in by_kernel(found, calls)["kernels"]] == [
        *("_first", "Memcpy DtoD (Device -> Device)", "_last")
    ]
