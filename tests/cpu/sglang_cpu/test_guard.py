"""The stand-ins cannot stand beside what they stand in for."""

import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from qwen3next_sglang_cpu_standins import DISTRIBUTION, finder, guard, plugin

PROJECT = Path(__file__).resolve().parents[2] / "sglang_cpu"


def put(site: Path, name: str, torch_version_file: str = "") -> Path:
    """A folder that holds the metadata of one distribution."""
    info = site / f"{name.replace('-', '_')}-9.9.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.9\n")
    if torch_version_file:
        (site / "torch").mkdir()
        (site / "torch" / "version.py").write_text(torch_version_file)
    return site


CPU = "__version__ = '2.13.0+cpu'\ncuda: Optional[str] = None\nhip: Optional[str] = None\n"
CUDA = "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip: Optional[str] = None\n"


def test_here_nothing_is_in_the_way() -> None:
    assert guard.why_not() is None


@pytest.mark.parametrize("name", ["sglang-kernel", "sgl_kernel", "TorchVision"])
def test_a_real_package_is_in_the_way(tmp_path: Path, name: str) -> None:
    refusal = guard.why_not([str(put(tmp_path, name))])
    assert refusal and "9.9 is installed" in refusal and refusal.startswith(DISTRIBUTION)


def test_so_is_a_torch_for_a_gpu_but_not_one_for_a_cpu(tmp_path: Path) -> None:
    assert guard.why_not([str(put(tmp_path / "cpu", "torch", CPU))]) is None
    refusal = guard.why_not([str(put(tmp_path / "gpu", "torch", CUDA))])
    assert refusal and "a build for cuda" in refusal


@pytest.mark.parametrize("isolated", [False, True])
def test_the_build_refuses(tmp_path: Path, isolated: bool) -> None:
    """As pip does it: a hook of the build in a process of the environment's Python."""
    environment = tmp_path / "env"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    put(site, "torchvision")
    setuptools = Path(str(metadata.distribution("setuptools").locate_file("")))
    # pip's isolation takes the environment's packages off the path, and puts what the build needs there.
    off = f"sys.path = [entry for entry in sys.path if entry != {str(site)!r}]; " if isolated else ""
    code = f"import sys; {off}sys.path.append({str(setuptools)!r}); from setuptools import build_meta as build; "
    code += f"build.build_wheel({str(tmp_path)!r})"
    command = [environment / "bin" / "python", "-c", code]
    built = subprocess.run(command, cwd=PROJECT, capture_output=True, text=True)
    assert built.returncode != 0 and f"{DISTRIBUTION}: torchvision 9.9 is installed" in built.stderr
    assert not list(tmp_path.glob("*.whl"))


def test_a_wheel_has_nothing_of_the_real_names(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "-w", tmp_path, PROJECT]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        top = {name.split("/")[0] for name in archive.namelist()}
    assert {name for name in top if "dist-info" not in name} == {
        "qwen3next_sglang_cpu_standins",
        "qwen3next_sglang_cpu_standins.pth",
    }


def run_python(code: str, *path: Path) -> "subprocess.CompletedProcess[str]":
    script = f"import sys; sys.path[:0] = {[str(entry) for entry in path]!r}\n{code}"
    return subprocess.run([sys.executable, "-P", "-c", script], capture_output=True, text=True)


def test_the_real_package_is_found_first(tmp_path: Path) -> None:
    (tmp_path / "torchvision.py").write_text("real = True\n")
    assert run_python("import torchvision; assert torchvision.real", tmp_path).returncode == 0


def test_the_import_refuses_beside_a_real_one(tmp_path: Path) -> None:
    put(tmp_path, "sglang-kernel")
    done = run_python("import sgl_kernel", tmp_path)
    assert done.returncode != 0 and f"ImportError: {DISTRIBUTION}: sglang-kernel 9.9 is installed" in done.stderr


def test_the_plugin_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plugin, "why_not", lambda: "no")
    with pytest.raises(SystemExit) as end:  # SGLang swallows every Exception of a plugin
        plugin.register()
    assert end.value.code == "no"


def test_names_that_are_only_imported_fail_when_called() -> None:
    modules: dict[str, Any] = {}
    code = "import sgl_kernel\nfrom torchvision.transforms import functional, InterpolationMode as mode"
    exec(code, modules)
    assert modules["mode"].BICUBIC.value == "bicubic"
    with pytest.raises(NotImplementedError, match="sgl_kernel.silu_and_mul has no stand-in"):
        modules["sgl_kernel"].silu_and_mul()
    with pytest.raises(NotImplementedError, match="no stand-in"):
        modules["functional"].resize()
    assert not hasattr(modules["sgl_kernel"], "__path_of_nothing__")


def test_it_answers_no_other_name() -> None:
    assert finder.StandInFinder().find_spec("numpy") is None
    finder.install()
    assert sum(isinstance(entry, finder.StandInFinder) for entry in sys.meta_path) == 1
