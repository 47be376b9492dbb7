"""The result files that are in the tree, and the tables made from them."""

from pathlib import Path

import pytest

from qwen3next_plugin.bench.check import check_file, result_files
from qwen3next_plugin.bench.tables import rewrite

ROOT = Path(__file__).resolve().parents[3]
RESULTS = result_files([ROOT / "benchmarks" / "results"])
DOCUMENTS = [path for path in (ROOT / "README.md", ROOT / "benchmarks" / "README.md") if path.exists()]


@pytest.mark.parametrize("file", RESULTS, ids=[str(file.relative_to(ROOT)) for file in RESULTS])
def test_every_result_file_may_be_believed(file: Path) -> None:
    assert check_file(file) == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])
def test_tables_are_those_of_the_files(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    assert rewrite(text, document.parent) == text, "qwen3next bench tables makes them anew"
