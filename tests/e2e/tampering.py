"""Environments in which something of an engine, or of this plugin, is not as it was: for tests of what is said then."""

from __future__ import annotations

import textwrap
from importlib.util import find_spec
from pathlib import Path

_FINDER = """
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == {module!r}:
            return importlib.util.spec_from_file_location(name, {source!r})

sys.meta_path.insert(0, Finder())
"""


def other_source(folder: Path, module: str, old: str, new: str) -> dict[str, str]:
    """Variables under which every Python process imports `module` from a copy in which `old` reads `new`."""
    source = _source(module)
    text = source.read_text()
    assert old in text, f"{old!r} is not in {source}"
    folder.mkdir()
    (folder / "changed_module.py").write_text(text.replace(old, new))
    finder = _FINDER.format(module=module, source=str(folder / "changed_module.py"))
    (folder / "sitecustomize.py").write_text(finder)
    return {"PYTHONPATH": str(folder)}


def _source(module: str) -> Path:
    """The file of a module. Engines are not imported for it, as looking for a submodule would."""
    top, *inner = module.split(".")
    ours = top == "qwen3next_plugin"
    spec = find_spec(module if ours else top)
    assert spec is not None and spec.origin is not None
    return Path(spec.origin) if ours else Path(spec.origin).parent.joinpath(*inner[:-1], f"{inner[-1]}.py")


def other_plugin(folder: Path, code: str, group: str = "sglang.srt.plugins") -> dict[str, str]:
    """Variables under which an engine finds one more plugin, behind all others, which runs `code`."""
    plugin = folder / "plugin"
    info = plugin / "zz_other-1.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zz-other\nVersion: 1\n")
    (info / "entry_points.txt").write_text(f"[{group}]\nzz_other = zz_other:plugin\n")
    (plugin / "zz_other.py").write_text(f"def plugin():\n{textwrap.indent(code, '    ')}")
    (folder / "sitecustomize.py").write_text(f"import sys\nsys.path.append({str(plugin)!r})\n")
    return {"PYTHONPATH": str(folder)}
