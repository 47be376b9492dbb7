"""Servers that must not start: one clear sentence that names what is wrong, a non-zero exit, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.broken_configs import BROKEN, SERVED

from .server import Exited, flags, run_until_exit


def assert_refused(ended: Exited, *named: str) -> None:
    """One sentence of the plugin's, with everything in it that the user has to know."""
    assert ended.code not in (0, None), ended.output
    assert len(ended.plugin_lines) == 1, ended.output
    (sentence,) = ended.plugin_lines
    assert sentence.endswith("."), sentence
    assert "Traceback" not in ended.output, ended.output
    for part in named:
        assert part in sentence, sentence


@pytest.fixture(scope="module")
def endings(random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Exited]:
    """How `vllm serve` ends on each broken config; two at a time, for most of it is imports."""
    folder = tmp_path_factory.mktemp("broken")

    def serve(kind: str) -> Exited:
        checkpoint = folder / kind.replace(" ", "_")
        shutil.copytree(random_checkpoint("tiny"), checkpoint)
        config = json.loads((checkpoint / "config.json").read_text())
        BROKEN[kind].mutate(config)
        (checkpoint / "config.json").write_text(json.dumps(config))
        return run_until_exit(checkpoint, *flags(), seconds=600)

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(SERVED, pool.map(serve, SERVED), strict=True))


@pytest.mark.parametrize("kind", SERVED)
def test_a_broken_config(endings: dict[str, Exited], kind: str) -> None:
    assert_refused(endings[kind], BROKEN[kind].field, BROKEN[kind].remedy)


def test_a_truncated_checkpoint(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    checkpoint = tmp_path / "truncated"
    shutil.copytree(random_checkpoint("tiny"), checkpoint)
    weights = checkpoint / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)
    assert_refused(run_until_exit(checkpoint, *flags(), seconds=600), "model.safetensors")


def patched(folder: Path, code: str) -> dict[str, str]:
    """An environment in which every Python process runs `code` first (as `usercustomize` does for some users)."""
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    return {"PYTHONPATH": str(folder)}


def test_an_unsupported_version(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    environment = patched(tmp_path / "site", "import vllm\nvllm.__version__ = '0.99.0'\n")
    ended = run_until_exit(random_checkpoint("tiny"), *flags(), env=environment, seconds=600)
    assert_refused(ended, "vllm 0.99.0", "not supported", "QWEN3NEXT_PLUGIN=0")


def test_a_drifted_dependency(random_checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    """A vLLM in which something this plugin relies on has another name."""
    code = (
        "import vllm.v1.attention.backends.utils as utils\n"
        "utils.get_mamba_block_table = utils.mamba_get_block_table_tensor\n"
        "del utils.mamba_get_block_table_tensor\n"
    )
    ended = run_until_exit(random_checkpoint("tiny"), *flags(), env=patched(tmp_path / "site", code), seconds=600)
    assert_refused(ended, "mamba_get_block_table_tensor")


def test_an_unknown_switch(random_checkpoint: Callable[[str], Path]) -> None:
    ended = run_until_exit(random_checkpoint("tiny"), *flags(), env={"QWEN3NEXT_PLUGINS": "0"}, seconds=600)
    assert_refused(ended, "QWEN3NEXT_PLUGINS", "QWEN3NEXT_PLUGIN")


def test_a_context_that_yarn_does_not_cover(random_checkpoint: Callable[[str], Path]) -> None:
    overrides = json.dumps({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}})
    arguments = [*flags(max_model_len=20000), "--hf-overrides", overrides]
    ended = run_until_exit(random_checkpoint("tiny"), *arguments, seconds=600)
    assert_refused(ended, "--max-model-len is 20000", "covers 16384", '"factor": 5.0')


def test_a_rope_of_another_model(random_checkpoint: Callable[[str], Path]) -> None:
    overrides = json.dumps({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}})
    ended = run_until_exit(random_checkpoint("tiny"), *flags(), "--hf-overrides", overrides, seconds=600)
    assert_refused(ended, "rope_theta is 10000", '"rope_theta": 10000000.0')
