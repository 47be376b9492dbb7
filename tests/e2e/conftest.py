"""Checkpoints that servers of several modules load; everything here starts real engines, so it is all marked `e2e`."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

if not (find_spec("vllm") or find_spec("sglang")):
    pytest.skip("neither vLLM nor SGLang is installed here", allow_module_level=True)

from qwen3next_plugin.demo.command import copy_shipped
from qwen3next_plugin.demo.random import write_random_checkpoint


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.e2e)


@pytest.fixture(scope="session")
def random_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`random_checkpoint(shape)`: a float32 checkpoint with random weights, written once a session."""
    written: dict[str, Path] = {}

    def write(shape: str) -> Path:
        if shape not in written:
            directory = tmp_path_factory.mktemp("checkpoints") / shape
            written[shape] = write_random_checkpoint(directory, shape, dtype="float32")
        return written[shape]

    return write


@pytest.fixture(scope="session")
def demo_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The trained model that this project ships."""
    directory = tmp_path_factory.mktemp("checkpoints") / "demo"
    copy_shipped(directory)
    return directory
