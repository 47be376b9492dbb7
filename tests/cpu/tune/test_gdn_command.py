"""`qwen3next tune gdn` as a user runs it: exit codes, sentences, files."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from qwen3next_plugin.errors import PluginError, SettingsError
from qwen3next_plugin.spec import Qwen3NextSpec
from qwen3next_plugin.tune import cuda
from qwen3next_plugin.tune.gdn import engines
from qwen3next_plugin.tune.gdn import machine as machine_module
from qwen3next_plugin.tune.gdn.space import Candidate, Shape
from tests.cpu.tune.fakes import H200
from tests.cpu.tune.gdn_fakes import FakeGdnMachine
from tests.cpu.tune.test_command import invoke


@pytest.fixture
def machines(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Qwen3NextSpec, str, FakeGdnMachine]]:
    """An H200 that answers at once; what every machine was made for."""
    made: list[tuple[Qwen3NextSpec, str, FakeGdnMachine]] = []

    def machine(spec: Qwen3NextSpec, engine: str, device: torch.device, offer: Callable[[], None]) -> FakeGdnMachine:
        made.append((spec, engine, FakeGdnMachine(noise=0.1)))
        return made[-1][2]

    monkeypatch.setattr(cuda, "this_gpu", lambda: H200)
    monkeypatch.setattr(machine_module, "CudaGdnMachine", machine)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    return made


def test_a_tuning_prints_its_file_and_how_to_serve_with_it(
    machines: list[tuple[Qwen3NextSpec, str, FakeGdnMachine]], tmp_path: Path
) -> None:
    arguments = ("gdn", "--out", str(tmp_path), "--effort", "quick", "--tp", "2", "--engine", "none")
    first = invoke(*arguments)
    path = tmp_path / "h200" / "gdn.json"
    assert first.exit_code == 0 and first.stdout.splitlines() == [
        str(path),
        f"Serve with it: QWEN3NEXT_GDN_CONFIGS={tmp_path}",
    ]
    assert "prefill 64x256: " in first.stderr and '"heads": "8/16"' in path.read_text()
    spec, engine, _ = machines[0]
    assert (spec.gdn.num_k_heads, spec.gdn.num_v_heads, engine) == (8, 16, "none")
    again = invoke(*arguments)
    assert again.exit_code == 0 and machines[0][2].answered and not machines[1][2].answered


def test_heads_may_be_given_instead(machines: list[tuple[Qwen3NextSpec, str, FakeGdnMachine]], tmp_path: Path) -> None:
    assert invoke("gdn", "--out", str(tmp_path), "--effort", "quick", "--heads", "4/8").exit_code == 0
    assert machines[0][0].gdn.num_v_heads == 8


def test_ctrl_c_says_how_to_go_on(
    machines: list[tuple[Qwen3NextSpec, str, FakeGdnMachine]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(self: FakeGdnMachine, shape: Shape, candidate: Candidate) -> float:
        raise KeyboardInterrupt

    arguments = ("gdn", "--out", str(tmp_path), "--effort", "quick")
    with monkeypatch.context() as patch:
        patch.setattr(FakeGdnMachine, "error", interrupted)
        stopped = invoke(*arguments)
    assert stopped.exit_code == 130 and "gdn.state.jsonl keeps what was measured" in stopped.stderr.splitlines()[-1]
    assert invoke(*arguments).exit_code == 0
    assert not set(machines[0][2].answered) & set(machines[1][2].answered)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--effort", "huge"), "--effort: 'huge' is not known: use quick, default, thorough."),
        (("--tp", "3"), "--tp: size 3 does not divide the 16 key and 32 value heads of the model."),
        (("--tp", "2", "--heads", "4/8"), "give one of the two"),
        (("--heads", "4/6"), "--heads: '4/6' is no number of key"),
        (("--heads", "32"), "--heads: '32' is no number of key"),
        (("--engine", "tgi"), "--engine: 'tgi' is not known: use vllm, sglang or none."),
        (("--out", "/dev/null/x"), "cannot be written"),
    ],
)
def test_wrong_arguments_are_one_sentence(
    arguments: tuple[str, ...],
    words: str,
    machines: list[tuple[Qwen3NextSpec, str, FakeGdnMachine]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PluginError) as caught:
        invoke("gdn", *arguments)
    assert words in str(caught.value) and "\n" not in str(caught.value) and not machines


def test_an_engine_that_is_not_here_is_said_and_one_that_is_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "find_spec", lambda name: object() if name == "sglang" else None)
    assert engines.engine_here(None) == engines.engine_here("sglang") == "sglang"
    with pytest.raises(SettingsError, match="--engine: vllm is not installed here: run it where it is"):
        engines.engine_here("vllm")
    monkeypatch.setattr(engines, "find_spec", lambda name: None)
    assert engines.engine_here(None) == engines.engine_here("none") == "none"
