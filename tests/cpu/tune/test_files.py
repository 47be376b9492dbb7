"""Files: written whole or not at all, the shipped ones as the model computes them, and what a tuning says."""

import io
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe import config
from qwen3next_plugin.kernels.moe.config import CONFIGS, read_file
from qwen3next_plugin.kernels.moe.ways import MAX_TOKENS
from qwen3next_plugin.tune import defaults, files
from qwen3next_plugin.tune.model import config_seconds
from qwen3next_plugin.tune.problem import TOKENS, TUNED
from qwen3next_plugin.tune.result import as_line, as_table, measured_file, model_file
from qwen3next_plugin.tune.run import parse_tokens
from qwen3next_plugin.tune.search import Winner
from qwen3next_plugin.tune.session import Progressing
from tests.cpu.tune.fakes import PUBLISHED, FakeMachine, run

SPEC = parse_config(config_of("80b"))


def test_a_file_is_replaced_whole_or_left_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "folder" / "file.json"
    files.write_atomically(path, "one")
    assert path.read_text() == "one" and path.stat().st_mode & 0o777 == 0o644

    def fail(*args: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            patch.setattr(os, step, fail)
            with pytest.raises(SettingsError, match=r"file.json cannot be written \(No space left on device\)"):
                files.write_atomically(path, "two")
        assert path.read_text() == "one" and [file.name for file in path.parent.iterdir()] == ["file.json"]


def test_every_known_gpu_has_a_file_for_every_usual_rank() -> None:
    expected = {
        f"{folder}/{problem.file_name}" for folder in KNOWN for _, problem in defaults.usual_problems(SPEC)
    }  # fmt: skip
    there = {str(path.relative_to(CONFIGS)) for path in CONFIGS.glob("*/*.json")}
    assert there == expected and len(there) == 140


def test_shipped_files_say_where_they_come_from_and_fit_their_gpu() -> None:
    for folder, gpu in KNOWN.items():
        for _, problem in defaults.usual_problems(SPEC):
            path = CONFIGS / folder / problem.file_name
            raw, content = json.loads(path.read_text()), read_file(path)
            assert ("not measured; to measure your own: qwen3next tune moe" in raw["note"]) == (
                content.source == "model"
            )
            # Measured from 24 tokens on; where tall tiles take over at 2,048, up to 1,024.
            assert len(content.entries) >= (14 if content.source == "model" else 7)
            assert content.entries[-1].tokens >= 1024
            for entry in content.entries:
                assert entry.activation_bytes == problem.activation_bytes(entry.tokens, gpu)
                assert config_seconds(gpu, problem, entry.tokens, entry.config) < 1


def test_computed_files_are_what_the_model_computes_now(proof: bool) -> None:
    """Run `qwen3next tune defaults --out kernels/moe/configs` after a change of the model. A few here, all in proof."""
    computed = defaults.computed_files(SPEC)
    for _ in range(140 if proof else 2):
        name, text = next(computed)
        if read_file(CONFIGS / name).source == "model":
            assert (CONFIGS / name).read_text() == text, name


def test_measured_files_are_not_overwritten_by_computed_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, _ = run(tmp_path, FakeMachine(PUBLISHED), tokens=(1,), effort="quick")
    before = path.read_text()
    monkeypatch.setattr(defaults, "SIZES", (("--tp", (1,)),))
    monkeypatch.setattr(defaults, "KNOWN", {"h200": KNOWN["h200"], "l40s": KNOWN["l40s"]})
    written = defaults.compute_files(tmp_path, SPEC)
    assert len(written) == 3 and path not in written and path.read_text() == before


def test_a_computed_file_names_the_command_that_measures() -> None:
    note = model_file(KNOWN["gb10"], PUBLISHED, "--tp 1")["note"]
    assert note.endswith("not measured; to measure your own: qwen3next tune moe --tp 1 --dtype fp8")


@pytest.mark.parametrize(
    ("gpu", "inner", "tokens", "said"),
    [
        ("h200", 512, (2048,), True),
        ("h200", 64, (2048,), False),
        ("l40s", 512, (2048,), False),
        ("h200", 512, (1,), False),
    ],
)
def test_a_measured_file_says_which_entries_serve_fewer_tokens(
    gpu: str, inner: int, tokens: tuple[int, ...], said: bool
) -> None:
    tiles = config.default_config(8, 8, 1)
    winners = [Winner(count, tiles, 1.0, tiles, 1.0, 0.0, 1) for count in tokens]
    note = measured_file(KNOWN[gpu], replace(PUBLISHED, inner=inner), {}, "quick", winners)["note"]
    assert ("; steps of 2048 tokens and more run in tiles of their own" in note) == said


def test_lines_and_table_before_and_after(tmp_path: Path) -> None:
    _, winners = run(tmp_path, FakeMachine(PUBLISHED, noise=0.5), tokens=(1, 64), effort="quick")
    assert as_line(winners[1]).startswith("64 tokens: ") and "x) with 16 rows, " in as_line(winners[1])
    shown = io.StringIO()
    Console(file=shown, width=100).print(as_table(winners))
    assert "before, us" in shown.getvalue() and shown.getvalue().count("w4") >= 2


def test_time_left_follows_what_was_measured_not_what_was_known() -> None:
    now = 0.0
    progress = Progressing(Console(quiet=True), 100, lambda: now)
    for _ in range(40):
        progress.tick(0.0)
    assert progress.left() == ""
    now = 10.0
    for _ in range(10):
        progress.tick(1e-3)
    assert progress.left() == "50 s left"
    now = 60.0
    assert progress.left() == "5 min left"


def test_nothing_is_tuned_that_has_no_tiles() -> None:
    """Up to MAX_TOKENS whole rows serve, whatever a file says."""
    assert min(TUNED) > MAX_TOKENS and set(TUNED) - set(TOKENS) == {24}


@pytest.mark.parametrize("text", ["", "0", "1,x", "-3", "1,,2"])
def test_wrong_numbers_of_tokens(text: str) -> None:
    with pytest.raises(SettingsError, match="--tokens: .* give some, as in 1,8,64,512"):
        parse_tokens(text)
    assert parse_tokens("64, 1,64") == (1, 64)


def test_a_picture_is_drawn_where_matplotlib_is(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path, _ = run(tmp_path, FakeMachine(PUBLISHED, noise=0.5), tokens=(1, 64), effort="quick")
    assert path.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
