"""Both engines' runs on one machine: first everything is rehearsed, side by side, then each run is alone."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.bench.engines import EngineSetup
from qwen3next_plugin.bench.kernels import session
from qwen3next_plugin.bench.kernels.both import Request, rehearsals, rows_of, run_both
from qwen3next_plugin.bench.kernels.cases import ALL_CASES
from qwen3next_plugin.bench.kernels.work import copies_of, rehearsing
from qwen3next_plugin.errors import SettingsError

from .test_kernels import SPEC, Clock, as_own, with_peers


def engine(folder: Path, name: str, *codes: int) -> EngineSetup:
    """A "Python" that writes down what it is asked for and when it begins and ends, with these exit codes in turn for
    runs that measure."""
    script, log, turns = folder / f"python-{name}", folder / "asked", folder / f"turns-{name}"
    turns.write_text("".join(f"{code}\n" for code in codes))
    script.write_text(
        f"""#!/bin/sh
shift 2
echo "begin $*" >> {log}
sleep 0.1
echo "end $*" >> {log}
echo "a row of {name}"
case "$*" in *--rehearse*) exit 0;; esac
code=$(head -n 1 {turns}); sed -i 1d {turns}
exit ${{code:-0}}
"""
    )
    script.chmod(0o755)
    return EngineSetup(str(script))


def request(folder: Path, rows: str, jobs: int | None = 4, minutes: float | None = None, *codes: int) -> Request:
    setups = {name: engine(folder, name, *codes) for name in ("vllm", "sglang")}
    return Request(rows, setups, folder / "out", folder / "work", minutes, jobs, "a1")


def test_rows_of_either_kind() -> None:
    assert rows_of("all") == {kind: list(names) for kind, names in ALL_CASES.items()}
    assert rows_of("moe-fp8-tp1-m1,moe-fp8-tp1-*")["moe"][:2] == ["moe-fp8-tp1-m1", "moe-fp8-tp1-m2"]
    assert rows_of("norm-add-1, moe-bf16-tp8-m3") == {"kernels": ["norm-add-1"], "moe": ["moe-bf16-tp8-m3"]}
    with pytest.raises(SettingsError, match="'gdn-decode-x' is no row"):
        rows_of("all,gdn-decode-x")


def test_every_row_is_rehearsed_once_beside_each_engine() -> None:
    found = rehearsals(rows_of("all"), ["vllm", "sglang"])
    for name in ("vllm", "sglang"):
        rows = [row for process in found if process.engine == name for row in process.rows.split(",")]
        assert sorted(rows) == sorted(row for names in ALL_CASES.values() for row in names)
    assert len({process.name for process in found}) == len(found) >= 16
    assert all(process.further == ("--rehearse",) for process in found)


def test_what_is_measured_runs_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_both(request(tmp_path, "norm-add-*,moe-fp8-tp1-*,moe-bf16-tp1-*", minutes=5.0))
    lines = (tmp_path / "asked").read_text().splitlines()
    assert len(lines) == 2 * (6 + 4)
    assert all("--rehearse" in line for line in lines[:12])
    measured = lines[12:]
    for begin, end in zip(measured[::2], measured[1::2], strict=True):
        assert begin.split()[0] == "begin" and end.split()[0] == "end" and begin.split()[1:] == end.split()[1:]
    asked = [line.split()[2:5:2] for line in measured[::2]]
    assert asked == [["kernels", "vllm"], ["kernels", "sglang"], ["moe", "vllm"], ["moe", "sglang"]]
    assert all(f"--out {tmp_path / 'out'} --commit a1 --minutes " in line for line in measured)
    left = [float(line.rsplit(" ", 1)[1]) for line in measured]
    assert sorted(left, reverse=True) == left and 4.5 < left[-1] < left[0] <= 5.0
    assert capsys.readouterr().out.count("a row of sglang") == 2


def test_a_lost_gpu_is_tried_again_and_an_error_ends_it(tmp_path: Path) -> None:
    run_both(request(tmp_path, "norm-add-1", 0, None, 3, 3, 0))
    lines = (tmp_path / "asked").read_text().splitlines()
    assert sum(line.startswith("begin bench kernels --peers vllm") for line in lines) == 3
    assert not any("--rehearse" in line or "--minutes" in line for line in lines)
    with pytest.raises(SettingsError, match=r"kernels beside vllm ended with exit code 2: see .*kernels-vllm.log"):
        run_both(request(tmp_path, "norm-add-1", 0, None, 2))


def test_sglang_compiles_only_what_is_measured_unless_a_user_wants_more(monkeypatch: pytest.MonkeyPatch) -> None:
    name = "SGLANG_JIT_DEEPGEMM_PRECOMPILE"
    monkeypatch.setenv(name, "1")
    session.engine_named("sglang")
    assert os.environ[name] == "1"
    monkeypatch.delenv(name)
    session.engine_named("vllm")
    assert name not in os.environ
    session.engine_named("sglang")
    assert os.environ[name] == "0"


def test_a_rehearsal_calls_everything_and_keeps_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(session, "_timer", lambda kind: clock)
    monkeypatch.setattr(session, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(session, "_spec", lambda: SPEC)
    monkeypatch.chdir(tmp_path)
    with_peers(monkeypatch, vllm=as_own)
    session.rehearse_parts("kernels", "vllm", "norm-add-5,norm-add-7")
    assert clock.count == 4 and not list(tmp_path.iterdir())
    with rehearsing():
        assert copies_of(1, 1, torch.device("cpu")) == 1
    assert copies_of(1, 1, torch.device("cpu")) > 1
