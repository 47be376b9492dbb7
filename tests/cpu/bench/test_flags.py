"""Flags that a user gives both sides, as the engines' command lines get them."""

import json

import pytest

from qwen3next_plugin.bench.engines import words_of
from qwen3next_plugin.errors import SettingsError

SIZES = '{"cudagraph_capture_sizes":[1,8,32,64,128,256]}'


@pytest.mark.parametrize(
    "written",
    [SIZES, f"'{SIZES}'", SIZES.replace('"', '\\"')],
    ids=["as it is", "in quotes", "behind backslashes"],
)
def test_json_among_flags_stays_json(written: str) -> None:
    words = words_of(f"--kv-cache-memory-bytes 38654705664 --compilation-config {written} --seed 1")
    assert words == ["--kv-cache-memory-bytes", "38654705664", "--compilation-config", SIZES, "--seed", "1"]


def test_json_may_have_spaces_and_objects_in_it() -> None:
    text = '{"mode": 3, "pass_config": {"fuse_norm_quant": false}}'
    assert json.loads(words_of(f"-cc {text}")[1]) == {"mode": 3, "pass_config": {"fuse_norm_quant": False}}


def test_other_words_are_split_as_by_a_shell() -> None:
    assert words_of("") == []
    assert words_of("  --name 'a b' --empty '' --tail {not json}") == [
        *("--name", "a b", "--empty", "", "--tail", "{not", "json}"),
    ]


def test_an_open_quote_is_refused() -> None:
    with pytest.raises(SettingsError, match="closing quot"):
        words_of("--name 'a")
