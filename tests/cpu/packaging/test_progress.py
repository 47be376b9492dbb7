"""What the user sees of a running step: redrawn on a terminal, plain lines elsewhere."""

import io
import time

import pytest

from qwen3next_plugin.serve.progress import Progress


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_plain_lines_appear_when_the_detail_changes_and_not_for_every_count() -> None:
    stream = io.StringIO()
    with Progress("Loading", stream) as step:
        for detail in ("weights", "weights", "cache"):
            step.update(detail)
        for count in range(50):
            step.update(f"{count} seen", counts=True)
    lines = stream.getvalue().splitlines()
    assert lines == ["  Loading …", "  Loading · 0 s · weights", "  Loading · 0 s · cache", "✓ Loading (0 s)"]


def test_a_long_step_speaks_up_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stream = io.StringIO()
    with Progress("Loading", stream) as step:
        now += 16
        step.update("", counts=True)
    assert "  Loading · 16 s\n" in stream.getvalue()


def test_a_terminal_has_one_line_that_is_redrawn() -> None:
    stream = Terminal()
    with Progress("Loading", stream) as step:
        step.update("weights")
    assert stream.getvalue().count("\n") == 1 and "Loading · 0 s · weights" in stream.getvalue()


def test_a_failed_step_is_marked() -> None:
    stream = io.StringIO()
    with pytest.raises(ValueError), Progress("Loading", stream):
        raise ValueError
    assert stream.getvalue().endswith("✗ Loading (0 s)\n")
