"""Work put off until a module is imported."""

import importlib
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from qwen3next_plugin.imports import when_imported

NAME = "qwen3next_test_of_imports"


@pytest.fixture(autouse=True)
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A module that nobody has imported; finders and modules are as before afterwards."""
    path = tmp_path / f"{NAME}.py"
    path.write_text("value = 1\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    yield path
    sys.modules.pop(NAME, None)


def test_it_waits_for_the_import_and_leaves_no_trace() -> None:
    finders = list(sys.meta_path)
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    assert importlib.util.find_spec(NAME) is not None
    assert seen == [] and NAME not in sys.modules
    importlib.import_module(NAME)
    assert seen == [1] and sys.meta_path == finders
    importlib.reload(sys.modules[NAME])
    assert seen == [1]


def test_it_is_done_at_once_where_the_module_is_there() -> None:
    importlib.import_module(NAME)
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    assert seen == [1]


def test_two_may_wait_for_one_module() -> None:
    seen: list[str] = []
    when_imported(NAME, lambda: seen.append("first"))
    when_imported(NAME, lambda: seen.append("second"))
    importlib.import_module(NAME)
    assert sorted(seen) == ["first", "second"]


def test_the_action_may_import_the_module() -> None:
    seen: list[object] = []
    when_imported(NAME, lambda: seen.append(importlib.import_module(NAME)))
    assert importlib.import_module(NAME) is seen[0]


def test_a_module_that_fails_may_be_imported_again(module: Path) -> None:
    seen: list[int] = []
    when_imported(NAME, lambda: seen.append(sys.modules[NAME].value))
    module.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(RuntimeError, match="not yet"):
        importlib.import_module(NAME)
    assert seen == []
    module.write_text("value = 22222222222222222222\n")
    importlib.invalidate_caches()
    importlib.import_module(NAME)
    assert seen == [22222222222222222222]


def test_a_missing_module_is_missing() -> None:
    when_imported(f"{NAME}_too", lambda: None)
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module(f"{NAME}_too")
