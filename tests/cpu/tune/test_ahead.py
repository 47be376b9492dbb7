"""What is compiled before anything is measured: all that will be, once, and nothing that is known."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import triton
from rich.console import Console
from typer.testing import CliRunner

from qwen3next_plugin import cli
from qwen3next_plugin.kernels.gdn.table import PrefillWay
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile
from qwen3next_plugin.tune import ahead, cuda
from qwen3next_plugin.tune.ahead import compile_ahead
from qwen3next_plugin.tune.gdn import machine as gdn_machine
from qwen3next_plugin.tune.gdn.space import EFFORTS, decodes, prefills, verifications
from tests.cpu.tune import gdn_fakes
from tests.cpu.tune.fakes import H200, PUBLISHED, SMALL, FakeMachine, Killed, run
from tests.cpu.tune.gdn_fakes import FakeGdnMachine
from tests.helpers import output_of, tritons

Kernel = tuple[int, str, int, Tile]
TILES = MoeConfig(16, Tile(32, 32, 4, 2), Tile(64, 64, 4, 3))


@pytest.fixture(autouse=True)
def _compiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where kernels are compiled; under the interpreter there is nothing to do."""
    monkeypatch.setattr(ahead, "interpreting", lambda: False)


def kernels(configs: list[tuple[int, MoeConfig]]) -> set[Kernel]:
    """Those of the two products."""
    return {
        (tokens, name, config.block_m, tile)
        for tokens, config in configs
        for name, tile in (("gate-up", config.gate_up), ("down", config.down))
    }


def timed(machine: FakeMachine) -> list[tuple[int, MoeConfig]]:
    return [(tokens, config) for what, tokens, config in machine.answered if what == "seconds"]


@pytest.mark.parametrize("effort", ["quick", "default", "thorough"])
def test_what_will_be_measured_is_compiled_and_nothing_else(effort: str, tmp_path: Path) -> None:
    machine = FakeMachine(PUBLISHED, noise=0.5)
    run(tmp_path, machine, effort=effort)
    assert kernels(machine.called) == kernels(timed(machine))
    assert len(set(machine.called)) == len(machine.called)
    again = FakeMachine(PUBLISHED)
    run(tmp_path, again, effort=effort)
    assert not again.called


@pytest.mark.parametrize("lives", range(0, 70, 6))
def test_what_is_known_is_not_compiled_again(lives: int, tmp_path: Path) -> None:
    first, second = (FakeMachine(PUBLISHED, noise=0.5, lives=count) for count in (lives, float("inf")))
    with pytest.raises(Killed):
        run(tmp_path, first)
    run(tmp_path, second)
    assert not set(second.called) & set(timed(first))
    off = kernels(second.called) ^ kernels(timed(second))
    assert off <= kernels(timed(first)) and len(off) <= 2, "the best tile of gate and up was known, or ran before"


def test_scouts_of_gated_deltanet_meet_compiled_kernels(tmp_path: Path) -> None:
    machine, effort = FakeGdnMachine(noise=0.3), EFFORTS["default"]
    gdn_fakes.run(tmp_path, machine)
    groups = [prefills(effort), *(decodes(effort, size) for size in (4, 2))]
    groups += [verifications(effort, drafts, size) for drafts in effort.drafts for size in (4, 2)]
    scouts = {shape for group in groups for shape in group.scouts}
    met = {
        (shape, one)
        for what, shape, one in machine.answered
        if what == "seconds" and shape in scouts and not (isinstance(one, PrefillWay) and one.own is None)
    }
    more = set(machine.called) - met
    assert met <= set(machine.called) and len(set(machine.called)) == len(machine.called)
    stages = {shape for shape, one in more if isinstance(one, PrefillWay)}
    assert stages == {shape for shape, _ in more} == set(groups[0].scouts), "stages of what was not the best"
    again = FakeGdnMachine()
    gdn_fakes.run(tmp_path, again)
    assert not again.called


@pytest.mark.parametrize("lives", range(0, 160, 20))
def test_known_shapes_are_not_compiled_for_again(lives: int, tmp_path: Path) -> None:
    first, second = FakeGdnMachine(lives=lives), FakeGdnMachine()
    with pytest.raises(Killed):
        gdn_fakes.run(tmp_path, first)
    gdn_fakes.run(tmp_path, second)
    assert not set(second.called) & {(shape, one) for what, shape, one in first.answered if what == "seconds"}


def fails(place: object, config: object) -> Callable[[], object]:
    raise RuntimeError("out of\nmemory")


def test_what_fails_ahead_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = run(tmp_path / "whole", FakeMachine(PUBLISHED, noise=0.5))
    gdn_whole, _ = gdn_fakes.run(tmp_path / "whole", FakeGdnMachine())
    for kind in (FakeMachine, FakeGdnMachine):
        monkeypatch.setattr(kind, "once", lambda self, place, config: fails(place, config))
    failing, _ = run(tmp_path / "failing", FakeMachine(PUBLISHED, noise=0.5))
    gdn_failing, _ = gdn_fakes.run(tmp_path / "failing", FakeGdnMachine())
    assert failing.read_text() == whole.read_text() and gdn_failing.read_text() == gdn_whole.read_text()


def test_failures_and_other_tritons_are_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(width=30)
    with console.capture() as said:
        compile_ahead(fails, [(1, 1)], console)
    assert said.get() == "Each kernel is compiled when it is measured (RuntimeError: out of memory).\n"
    monkeypatch.delattr(triton, "AsyncCompileMode")
    machine = FakeMachine(PUBLISHED)
    with console.capture() as said:
        compile_ahead(machine.once, [(1, TILES)], console)
    assert said.get().startswith("Each kernel is compiled when it is measured (ImportError: ")
    assert not machine.called and said.get().count("\n") == 1


def test_nothing_is_run_by_the_interpreter_instead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(ahead, "interpreting", lambda: True)
    machine = FakeMachine(PUBLISHED)
    run(tmp_path, machine, tokens=(1,))
    assert machine.answered and not machine.called


@pytest.mark.parametrize("what", ["moe", "gdn"])
def test_ctrl_c_while_compiling_says_how_to_go_on(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: object, place: object, config: object) -> object:
        raise KeyboardInterrupt

    for kind in (FakeMachine, FakeGdnMachine):
        monkeypatch.setattr(kind, "once", interrupted)
    monkeypatch.setattr(cuda, "this_gpu", lambda: H200)
    monkeypatch.setattr(cuda, "layers_that_fit", lambda problem: 1)
    monkeypatch.setattr(cuda, "CudaMachine", lambda problem, gpu, layers, device: FakeMachine(problem, gpu))
    monkeypatch.setattr(gdn_machine, "CudaGdnMachine", lambda *arguments: FakeGdnMachine())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    stopped = CliRunner().invoke(cli.app, ["tune", what, "--out", str(tmp_path)])
    assert stopped.exit_code == 130 and "run the same command again" in stopped.stderr.splitlines()[-1]
    assert len(next(tmp_path.glob("h200/*.state.jsonl")).read_text().splitlines()) == 1, "nothing is measured yet"


@pytest.mark.parametrize("folder", tritons(), ids=lambda folder: "of the GPUs" if folder else "installed")
def test_kernels_are_compiled_in_threads_and_not_launched(folder: str, tmp_path: Path) -> None:
    lines = output_of("tests.cpu.tune.compiled_ahead", "90", triton=folder, TRITON_CACHE_DIR=str(tmp_path))
    found = json.loads(lines[-1])
    products = 3  # two of gate and up, one of down, which they share
    assert found["ahead"] == [*["_grouped_kernel"] * products, "_ordered_kernel", "_weighted_sum_kernel"]
    assert found["in_threads"] == [True] and found["when_measured"] == []
    assert found["unfinished"] == 0 and found["refused"] == "CompilationError", "compiled again, refused there"
    assert found["launches_again"], "the driver launches nothing, and now is asked to"
    assert found["interrupted"] == [] and "_grouped_kernel" in found["after_the_interrupt"]


def test_inputs_are_those_that_are_measured(device: str) -> None:
    """Made by launches that do run: what was only compiled would leave wrong choices of experts behind."""
    machine = cuda.CudaMachine(SMALL, H200, 1, torch.device(device))
    machine.once(9, TILES)
    before = machine.calls
    assert len(before) == cuda._CALLS and machine.error(9, TILES) < 2e-2
    assert machine.calls is before
