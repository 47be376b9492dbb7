"""The machine that measures: its inputs and its check against the reference, on a CPU; its clock, on a GPU."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from qwen3next_plugin.kernels import dispatch
from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile, read_file
from qwen3next_plugin.tune import cuda
from qwen3next_plugin.tune.cuda import CudaMachine
from qwen3next_plugin.tune.measuring import GpuLostError, TrialError
from qwen3next_plugin.tune.problem import Problem
from qwen3next_plugin.tune.run import tune
from qwen3next_plugin.tune.session import About, Place

CONFIG = MoeConfig(16, Tile(32, 32, 4, 2), Tile(64, 64, 4, 3))
PROBLEMS = [Problem(4, 4, 2, 64, 32, "bf16"), Problem(4, 4, 2, 192, 64, "fp8"), Problem(2, 8, 3, 128, 160, "fp8")]


@pytest.fixture
def triton_runs() -> Iterator[None]:
    """Triton's version, under the interpreter where there is no GPU."""
    dispatch.prefer(dispatch.TRITON)
    yield
    dispatch.prefer(None)


@pytest.mark.parametrize("problem", PROBLEMS)
@pytest.mark.usefixtures("triton_runs")
def test_a_right_kernel_passes_and_a_wrong_one_does_not(
    problem: Problem, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = CudaMachine(problem, KNOWN["h200"], 2, torch.device(device))
    assert machine.error(9, CONFIG) < 2e-2
    expected = cuda.reference.fused_moe
    monkeypatch.setattr(cuda.reference, "fused_moe", lambda *args: expected(*args) * 1.5)
    assert machine.error(9, CONFIG) > 0.2, "the same with a reference of half as much again"


def test_inputs_of_a_rank_and_how_many_calls_it_takes_to_leave_the_cache(device: str) -> None:
    problem = Problem(2, 8, 3, 128, 160, "fp8")
    machine = CudaMachine(problem, KNOWN["h200"], 2, torch.device(device))
    machine._prepare(50)
    assert len(machine.calls) == cuda._CALLS, "a small problem never leaves the cache"
    ids = torch.cat([call[4] for call in machine.calls])
    assert set(ids.unique().tolist()) == {-1, 0, 1}, "other ranks' experts are skipped"
    assert machine.calls[0][1] is machine.calls[2][1] is not machine.calls[1][1], "layers take turns"
    read = problem.touched(50) * 3 * 128 * 160
    machine.tokens, machine.gpu = 0, cuda.replace(machine.gpu, l2=int(2 * read))
    machine._prepare(50)
    assert len(machine.calls) == 8, "four times the cache"


def test_what_a_failed_run_means(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = CudaMachine(PROBLEMS[0], KNOWN["h200"], 1, torch.device(device))

    def fail(*args: Any) -> None:
        raise RuntimeError("out of\nresources")

    monkeypatch.setattr(cuda.moe, "fused_moe", fail)
    with pytest.raises(TrialError, match="RuntimeError: out of resources"):
        machine.error(3, CONFIG)
    monkeypatch.setattr(torch, "zeros", fail)
    with pytest.raises(GpuLostError, match="out of resources"):
        machine.error(3, CONFIG)


def test_versions_name_the_kernels() -> None:
    found = cuda.versions(cuda.moe_files())
    assert found["triton"] and found["torch"] and len(found["kernels"]) == 12
    assert cuda.this_machine() == cuda.this_machine()


@pytest.mark.gpu
def test_a_whole_tuning_on_this_gpu(tmp_path: Path) -> None:
    gpu, problem = cuda.this_gpu(), Problem(16, 16, 2, 256, 128, "bf16")

    def machine() -> CudaMachine:
        return CudaMachine(problem, gpu, 2, torch.device("cuda", 0))

    about = About(cuda.versions(cuda.moe_files()), cuda.this_machine())
    place, console = Place(tmp_path, None), Console(quiet=True)
    path, winners = tune(gpu, problem, "quick", (1, 64), place, about, machine, console)
    assert read_file(path).source == "measured"
    assert all(0 < winner.seconds <= winner.before_seconds < 0.01 for winner in winners)
