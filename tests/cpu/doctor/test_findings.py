"""Every finding of the doctor, brought about once, in environments made of files."""

from pathlib import Path

import pytest

from qwen3next_plugin.doctor.checks import CHECKS, examine
from qwen3next_plugin.doctor.finding import Level
from qwen3next_plugin.doctor.surroundings import Surroundings
from tests.cpu.doctor import cases_installed, cases_serving
from tests.cpu.doctor.places import GPU, Place

CASES = cases_installed.CASES | cases_serving.CASES


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_nothing_is_found_where_nothing_is_wrong(place: Place) -> None:
    findings = place.findings()
    assert [finding for finding in findings if finding.level is not Level.OK] == []
    said = {finding.check: finding.found for finding in findings}
    assert "torch 2.13.0+cpu (built for cpu)" in said["installed"]
    assert "is active" in said["vllm"] and said["device"] == "CPU, no NVIDIA GPU"


def test_nothing_is_found_on_a_machine_with_gpus(place: Place) -> None:
    place.gpus(GPU, GPU)
    place.install("torch", "2.13.0+cu130", requires=["nvidia-cublas"])
    place.install("nvidia-cublas", "13.1")
    place.install("vllm", "0.32.0", requires=["torch==2.13.0"])
    findings = place.findings()
    assert [finding for finding in findings if finding.level is not Level.OK] == []
    assert any("2 x NVIDIA H200 (140 GiB, compute capability 9.0)" in finding.found for finding in findings)


@pytest.mark.parametrize("name", CASES)
def test_a_finding_and_its_remedy(name: str, place: Place) -> None:
    case = CASES[name]
    case.breaks(place)
    findings = place.findings()
    matching = [finding for finding in findings if finding.check == case.check and case.found in finding.found]
    assert len(matching) == 1, findings
    assert matching[0].level == case.level and case.remedy in matching[0].remedy
    assert not any(finding.check == "doctor" for finding in findings), findings


def test_whatever_is_wrong_has_a_remedy_and_one_line(place: Place) -> None:
    for name in ("torch", "vllm", "qwen3next-plugin"):
        place.uninstall(name)
    place.install("sglang", "nonsense")
    wrong = [finding for finding in place.findings() if finding.level is not Level.OK]
    assert len(wrong) > 4
    assert all(finding.remedy and "\n" not in finding.found for finding in wrong)


def test_every_check_but_none_twice() -> None:
    assert len(set(CHECKS)) == len(CHECKS)


def test_a_check_that_fails_is_a_finding(place: Place) -> None:
    def broken(_: Surroundings) -> None:
        raise OSError("disk on fire")

    *_, last = examine(place.surroundings(), (CHECKS[0], broken))  # type: ignore[arg-type]
    assert (last.level, last.check) == (Level.WARNING, "doctor") and "disk on fire" in last.found


def test_a_program_that_hangs_is_given_up(place: Place) -> None:
    place.program("nvidia-smi", "while :; do :; done")
    outcome = place.surroundings().run(["nvidia-smi"], timeout=0.2)
    assert outcome.returncode is None and "no answer within" in outcome.stderr
