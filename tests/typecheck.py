"""Run mypy over the package and its tests: `python tests/typecheck.py [mypy arguments]`.

The top-level folders are imported under one root (package-dir in pyproject.toml), which mypy cannot be told. So a tree
of symbolic links with the imported names is laid out under build/typed/ and mypy is pointed at that.
"""

import os
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STAND_INS = "qwen3next_sglang_cpu_standins"


def wanted_links() -> dict[str, Path]:
    """Link (relative to the tree) -> what it stands for, read from package-dir."""
    folders: dict[str, str] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-dir"]
    links = {STAND_INS: ROOT / "tests" / "sglang_cpu" / STAND_INS}
    for name, folder in folders.items():
        if "." in name:
            links[name.replace(".", "/")] = ROOT / folder
        else:  # the root package is a real folder, so that mapped ones can stand inside it
            links |= {f"{name}/{item.name}": item for item in (ROOT / folder).iterdir() if item.name != "__pycache__"}
    return links


def lay_out(tree: Path) -> None:
    """Make `tree` hold exactly the wanted links; what is right already stays, so two runs do not disturb each other."""
    links = wanted_links()
    for path in tree.glob("*/*"):
        ours = path.is_symlink() and not path.parent.is_symlink()  # never what a link leads to
        if ours and str(path.relative_to(tree)) not in links:
            path.unlink(missing_ok=True)
    for name, target in links.items():
        path = tree / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.is_symlink():
            path.symlink_to(target)


def main() -> None:
    """Lay out the tree and become mypy."""
    tree = ROOT / "build" / "typed"
    lay_out(tree)
    os.chdir(ROOT)
    os.environ["MYPYPATH"] = f"{tree}:{ROOT}"
    packages = ("qwen3next_plugin", STAND_INS, "tests")
    chosen = [part for name in packages for part in ("-p", name)]
    command = [sys.executable, "-m", "mypy", *sys.argv[1:], *chosen]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
