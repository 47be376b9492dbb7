"""What is tracked, what a wheel holds, and what no file may name."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
LIMIT = 12_000_000
FOLDERS: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]

# Put together here, so that this file does not name them either.
FOREIGN = re.compile(
    "|".join(
        [
            *(f"/{name}/" for name in ("work", "farm", "root")),
            *("python" + "hosted", r"pypi\." + "org", r"registry\." + "npmjs", r"deb\." + "debian"),
        ]
    )
)


def tracked() -> list[Path]:
    """Tracked files that are there, relative to the root."""
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True)
    return [Path(name) for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def imported_name(path: Path) -> str | None:
    """Where a tracked file of the package stands in a wheel; None for files outside it."""
    for name, folder in sorted(FOLDERS.items(), key=lambda item: -len(item[1])):
        if path.is_relative_to(folder):
            return f"{name.replace('.', '/')}/{path.relative_to(folder)}"
    return None


def test_tracked_files_stay_below_twelve_megabytes() -> None:
    sizes = {path: os.path.getsize(ROOT / path) for path in tracked()}
    largest = sorted(sizes, key=lambda path: -sizes[path])[:5]
    assert sum(sizes.values()) < LIMIT, f"the largest are {[(str(path), sizes[path]) for path in largest]}"


def test_no_tracked_file_names_a_machine_or_a_registry() -> None:
    found = []
    for path in tracked():
        content = (ROOT / path).read_bytes()
        if b"\0" in content:
            continue
        for number, line in enumerate(content.decode(errors="replace").splitlines(), 1):
            if FOREIGN.search(line):
                found.append(f"{path}:{number}: {line.strip()[:80]}")
    assert not found, "\n".join(found)


def test_every_package_folder_is_listed() -> None:
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    there = {name.rpartition("/")[0].replace("/", ".") for path in tracked() if (name := imported_name(path) or "")}
    with_python = {name for name in there if list((ROOT / folder_of(name)).glob("*.py"))}
    assert with_python == listed


def folder_of(package: str) -> str:
    """The folder in the repository that a package is made from."""
    for name in sorted(FOLDERS, key=len, reverse=True):
        if package == name or package.startswith(f"{name}."):
            return FOLDERS[name] + package.removeprefix(name).replace(".", "/")
    raise AssertionError(package)


def test_a_wheel_holds_all_of_the_package_and_nothing_else(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for path in tracked():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / path, source / path)
    options = ["--no-deps", "--no-build-isolation", "-w", str(tmp_path)]
    command = [sys.executable, "-m", "pip", "wheel", *options, str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        entry_points = next(name for name in archive.namelist() if name.endswith("entry_points.txt"))
        points = archive.read(entry_points).decode()
    assert names == {name for path in tracked() if (name := imported_name(path))}
    assert "[vllm.general_plugins]" in points and "qwen3next = qwen3next_plugin.cli:main" in points


def test_the_licence_is_apache_2_and_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Apache License" in text and "END OF TERMS AND CONDITIONS" in text and len(text) > 11_000
