"""Servers that must not start: one clear sentence that names what is wrong, a non-zero exit, and no traceback."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.broken_configs import BROKEN, SERVED

from .engine import Setup
from .server import Exited, engine, run_until_exit
from .tampering import other_plugin, other_source

TOO_LONG = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}
OTHER_THETA = {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}


@dataclass(frozen=True)
class Case:
    """What is done to a server that would start otherwise, and what the refusal has to say."""

    named: tuple[str, ...]
    spoil: Callable[[Path], object] = lambda checkpoint: None
    environment: Callable[[Path], dict[str, str]] = lambda folder: {}
    setup: Setup = Setup()
    overrides: dict[str, Any] = field(default_factory=dict)


def break_config(kind: str) -> Callable[[Path], object]:
    def spoil(checkpoint: Path) -> None:
        config = json.loads((checkpoint / "config.json").read_text())
        BROKEN[kind].mutate(config)
        (checkpoint / "config.json").write_text(json.dumps(config))

    return spoil


def truncate(checkpoint: Path) -> None:
    weights = checkpoint / "model.safetensors"
    with weights.open("r+b") as file:
        file.truncate(weights.stat().st_size // 2)


CASES = {kind: Case((BROKEN[kind].field, BROKEN[kind].remedy), break_config(kind)) for kind in SERVED} | {
    "truncated checkpoint": Case(("model.safetensors",), truncate),
    "unknown switch": Case(
        ("QWEN3NEXT_PLUGINS", "QWEN3NEXT_PLUGIN"), environment=lambda folder: {"QWEN3NEXT_PLUGINS": "0"}
    ),
    "context that YaRN does not cover": Case(
        (f"{engine().length_flag} is 20000", "covers 16384", '"factor": 5.0'),
        setup=Setup(max_model_len=20000),
        overrides=TOO_LONG,
    ),
    "rope of another model": Case(("rope_theta is 10000", '"rope_theta": 10000000.0'), overrides=OTHER_THETA),
    "unsupported version": Case(
        (f"{engine().name} 0.99.0", "not supported", "QWEN3NEXT_PLUGIN=0"),
        environment=lambda folder: other_source(folder, *engine().version_change),
    ),
    "drifted dependency": Case(
        (engine().drift[1].split()[-1].strip("("), "relies on it"),
        environment=lambda folder: other_source(folder, *engine().drift),
    ),
}
QUICK = {"missing", "truncated checkpoint", "unsupported version", "drifted dependency"}
QUICK |= {"error while registering", "another plugin's hook"}

if engine().name == "sglang":  # vLLM ends by itself when a plugin raises
    CASES["error while registering"] = Case(
        ("registering with", "something unforeseen", "QWEN3NEXT_PLUGIN=0"),
        environment=lambda folder: other_source(
            folder,
            "qwen3next_plugin.sglang_integration.registration",
            "    check_engine(",
            "    raise RuntimeError('something unforeseen')\n    check_engine(",
        ),
    )
    CASES["another plugin's hook"] = Case(
        ("GDNAttnBackend", "not in force", "QWEN3NEXT_PLUGIN=0"),
        environment=lambda folder: other_plugin(
            folder,
            "from sglang.srt.plugins.hook_registry import HookRegistry, HookType\n"
            "target = 'sglang.srt.layers.attention.linear.gdn_backend.GDNAttnBackend'\n"
            "HookRegistry.register(target, dict, HookType.REPLACE)\n",
        ),
    )


@pytest.fixture(scope="module")
def endings(
    request: pytest.FixtureRequest, random_checkpoint: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, Future[Exited]]]:
    """How the engine ends in each selected case; two at a time, for most of it is imports."""
    whole = random_checkpoint("tiny")
    chosen = {item.callspec.params.get("kind") for item in request.session.items if hasattr(item, "callspec")}

    def serve(kind: str) -> Exited:
        folder = tmp_path_factory.mktemp("refused")
        checkpoint, case = folder / "checkpoint", CASES[kind]
        shutil.copytree(whole, checkpoint)
        case.spoil(checkpoint)
        arguments = engine().flags(case.setup)
        if case.overrides:
            arguments += engine().override(case.overrides)
        return run_until_exit(checkpoint, *arguments, env=case.environment(folder / "site"), seconds=600)

    with ThreadPoolExecutor(2) as pool:
        yield {kind: pool.submit(serve, kind) for kind in CASES if kind in chosen}


@pytest.mark.parametrize("kind", [pytest.param(k, marks=[pytest.mark.quick] * (k in QUICK)) for k in CASES])
def test_refused_with_one_sentence(endings: dict[str, Future[Exited]], kind: str) -> None:
    """One sentence of the plugin's, with everything in it that the user has to know."""
    ended = endings[kind].result()
    assert ended.code not in (0, None), ended.output
    assert len(ended.plugin_lines) == 1, ended.output
    (sentence,) = ended.plugin_lines
    assert sentence.endswith("."), sentence
    assert "Traceback" not in ended.output, ended.output
    for part in CASES[kind].named:
        assert part in sentence, sentence
