"""Until SGLang is integrated, its entry point says that the engine is the stock one."""

import logging
from importlib.metadata import entry_points

import pytest


def test_the_entry_point_is_found_and_says_stock(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("QWEN3NEXT_PLUGIN", raising=False)
    (entry,) = entry_points(group="sglang.srt.plugins", name="qwen3next")
    with caplog.at_level(logging.WARNING):
        entry.load()()
    (record,) = caplog.records
    assert "stock SGLang" in record.getMessage()


def test_switched_off_it_is_silent(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    from qwen3next_plugin.sglang_integration import register

    monkeypatch.setenv("QWEN3NEXT_PLUGIN", "0")
    with caplog.at_level(logging.WARNING):
        register()
    assert not caplog.records
