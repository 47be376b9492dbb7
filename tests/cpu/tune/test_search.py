"""A tuning with a machine that answers at once: winners, resuming, refusals."""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwen3next_plugin.errors import PluginError, SettingsError
from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import MoeConfig, nearest, read_file
from qwen3next_plugin.tune.measuring import GpuLostError, TrialError
from qwen3next_plugin.tune.model import config_seconds
from qwen3next_plugin.tune.problem import Problem
from qwen3next_plugin.tune.session import About
from qwen3next_plugin.tune.space import Effort, candidates
from tests.cpu.tune.fakes import ABOUT, H200, PUBLISHED, SMALL, FakeMachine, Killed, run


def test_the_winner_is_the_best_of_all_combinations_when_times_add_up(tmp_path: Path) -> None:
    _, winners = run(tmp_path, FakeMachine(PUBLISHED), effort="thorough")
    for winner in winners:
        kept = candidates(H200, PUBLISHED, winner.tokens, Effort(1.0, 1000, 1000))
        best = min(
            config_seconds(H200, PUBLISHED, winner.tokens, MoeConfig(found.block_m, first, second))
            for found in kept
            for first in found.gate_up
            for second in found.down
        )
        assert winner.seconds == pytest.approx(best)
        assert winner.seconds <= winner.before_seconds


def test_the_file_is_what_the_kernels_read(tmp_path: Path) -> None:
    path, winners = run(tmp_path, FakeMachine(PUBLISHED, noise=0.3), tokens=(1, 64, 4096))
    assert path == tmp_path / "h200" / "E=512,H=2048,I=512,dtype=float8_e4m3fn.json"
    content = read_file(path)
    assert content.source == "measured"
    assert [(entry.tokens, entry.activation_bytes) for entry in content.entries] == [(1, 2), (64, 1), (4096, 1)]
    assert nearest(content.entries, 80, 1) == winners[1].config
    raw = json.loads(path.read_text())
    assert raw["versions"] == ABOUT.versions and raw["gpu"]["name"] == "NVIDIA H200"
    assert all(entry["us"] <= entry["before_us"] and entry["relative_error"] == 1e-3 for entry in raw["entries"])
    assert not [file for file in path.parent.iterdir() if file.name.startswith(".")]


def final(folder: Path) -> str:
    return next(folder.glob("h200/*.json")).read_text().replace('"machines": 2', '"machines": 1')


@given(lives=st.integers(0, 70), noise=st.sampled_from([0.0, 0.5]), cut=st.integers(0, 200))
def test_killed_anywhere_and_resumed_it_ends_the_same_and_measures_nothing_twice(
    lives: int, noise: float, cut: int
) -> None:
    """`cut` bytes of the last line were still unwritten when the machine went away."""
    problem = Problem(512, 512, 10, 2048, 512, "bf16")
    with tempfile.TemporaryDirectory() as name:
        whole, broken = Path(name) / "whole", Path(name) / "broken"
        at_once = FakeMachine(problem, noise=noise)
        run(whole, at_once)
        first = FakeMachine(problem, noise=noise, lives=lives)
        lost = None
        try:
            run(broken, first)
        except Killed:
            state = next(broken.glob("h200/*.state.jsonl"))
            *_, last = state.read_bytes().splitlines(keepends=True)
            cut = min(cut, len(last))
            state.write_bytes(state.read_bytes()[: -cut or None])
            lost = first.answered[-1] if cut and b'"machine"' in last else None
        second = FakeMachine(problem, noise=noise)
        run(broken, second, about=About(ABOUT.versions, "machine two"))
        assert final(whole) == final(broken)
        again = [answer for answer in second.answered if answer in first.answered]
        assert again == ([] if lost is None else [lost])
        assert (
            len(set(second.answered))
            == len(second.answered)
            == len(at_once.answered) - len(first.answered) + len(again)
        )


def test_more_tokens_later_measure_only_those(tmp_path: Path) -> None:
    run(tmp_path, FakeMachine(PUBLISHED), tokens=(1, 64))
    later = FakeMachine(PUBLISHED)
    _, winners = run(tmp_path, later, tokens=(1, 8, 64))
    assert {tokens for _, tokens, _ in later.answered} == {8}
    assert [winner.tokens for winner in winners] == [1, 8, 64]


def test_a_mixture_of_machines_is_marked(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(tmp_path, FakeMachine(PUBLISHED, lives=10), tokens=(1, 64))
    path, _ = run(tmp_path, FakeMachine(PUBLISHED), tokens=(1, 64), about=About(ABOUT.versions, "machine two"))
    assert [entry["machines"] for entry in json.loads(path.read_text())["entries"]] == [2, 1]


def test_a_fast_config_with_wrong_output_does_not_win(tmp_path: Path) -> None:
    path, winners = run(tmp_path / "right", FakeMachine(PUBLISHED, noise=0.1), tokens=(64,))
    fastest = winners[0].config
    machine = FakeMachine(PUBLISHED, noise=0.1, wrong=lambda config: config == fastest)
    _, (other,) = run(tmp_path / "wrong", machine, tokens=(64,))
    assert other.config != fastest and other.seconds >= winners[0].seconds and other.error <= 1e-3
    with pytest.raises(PluginError, match="No config for 64 tokens gives the reference's output"):
        run(tmp_path / "all", FakeMachine(PUBLISHED, wrong=lambda config: True), tokens=(64,))
    assert not list((tmp_path / "all").glob("h200/*.json"))


def test_configs_that_do_not_run_are_passed_over_and_not_asked_again(tmp_path: Path) -> None:
    def refuses(config: MoeConfig) -> Exception | None:
        return TrialError("out of resources") if config.gate_up.num_stages > 3 else None

    machine = FakeMachine(PUBLISHED, noise=0.2, refuses=refuses)
    _, winners = run(tmp_path, machine, tokens=(1, 64))
    assert all(winner.config.gate_up.num_stages <= 3 and math.isfinite(winner.seconds) for winner in winners)
    again = FakeMachine(PUBLISHED)
    run(tmp_path, again, tokens=(1, 64))
    assert not again.answered
    with pytest.raises(PluginError, match=r"No config runs with 1 tokens \(no FP8 here\): nothing was written"):
        run(tmp_path / "none", FakeMachine(PUBLISHED, refuses=lambda config: TrialError("no FP8 here")))


def test_a_config_that_fells_the_gpu_is_left_out_when_it_is_taken_up_again(tmp_path: Path) -> None:
    def refuses(config: MoeConfig) -> Exception | None:
        return GpuLostError("illegal access") if config.gate_up.num_stages == 2 else None

    deaths = 0
    for _ in range(50):
        try:
            _, (winner,) = run(tmp_path, FakeMachine(PUBLISHED, refuses=refuses), tokens=(64,))
            break
        except PluginError as error:
            assert "illegal access" in str(error) and "run the same command again" in str(error)
            deaths += 1
    assert deaths and winner.config.gate_up.num_stages != 2


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gpu": KNOWN["h100"]}, "another gpu (NVIDIA H200; here it is NVIDIA H100 80GB HBM3)"),
        ({"problem": Problem(512, 512, 10, 2048, 256, "fp8")}, "another problem"),
        ({"about": About({**ABOUT.versions, "triton": "3.9"}, "m")}, "another triton (3.7; here it is 3.9)"),
        ({"about": About({**ABOUT.versions, "kernels": "xyz"}, "m")}, "another kernels (abc; here it is xyz)"),
    ],
)
def test_a_state_of_something_else_is_refused_in_one_sentence(
    change: dict[str, Any], words: str, tmp_path: Path
) -> None:
    state = tmp_path / "state.jsonl"
    run(tmp_path, FakeMachine(PUBLISHED), tokens=(1,), state=state)
    before = state.read_bytes()
    machine = FakeMachine(change.get("problem", PUBLISHED), change.get("gpu", H200))
    with pytest.raises(SettingsError) as caught:
        run(tmp_path, machine, tokens=(1,), state=state, about=change.get("about", ABOUT))
    assert words in str(caught.value) and str(caught.value).endswith("give another --state.")
    assert not machine.answered and state.read_bytes() == before


@pytest.mark.parametrize("content", ["hello\n", "[]\n", '{"format": 1}\n', '{"format": 9, "identity": {}}\n', "\0\n"])
def test_a_file_that_is_no_state_is_refused_and_left_alone(content: str, tmp_path: Path) -> None:
    state = tmp_path / "state.jsonl"
    state.write_text(content)
    with pytest.raises(SettingsError, match="state.jsonl (is not a state file|has format 9)"):
        run(tmp_path, FakeMachine(SMALL), state=state)
    assert state.read_text() == content


def test_a_folder_that_cannot_be_written_is_told_before_anything_is_measured(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    machine = FakeMachine(SMALL)
    with pytest.raises(SettingsError, match=r"cannot be written \(.*\): give another --out"):
        run(tmp_path / "file", machine)
    with pytest.raises(SettingsError, match=r"file/state\.jsonl cannot be .*: give another --state"):
        run(tmp_path, machine, state=tmp_path / "file" / "state.jsonl")
    assert not machine.answered
