"""Requests for a rope that cannot be right, for the 80B model: what the refusal names and the dict it has to print."""

import json
from collections.abc import Callable
from typing import Any

import pytest

from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.rope_request import RopeShortcut

TRAINED = 262144
MILLION = 4 * TRAINED
GUIDE = json.loads('{"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 262144}}')
YARN = GUIDE["rope_scaling"]
# What a checkpoint of ours and "factor 4" leave open.
COMPLETED = {
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "attention_factor": pytest.approx(1.1386294361119891, rel=1e-12),
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}

# request, what the sentence has to name, the factor of the right dict
WRONG: dict[str, tuple[dict[str, Any], tuple[str, ...], float]] = {
    "two attention factors": (
        {"asked": YARN | {"attn_factor": 1.2, "attention_factor": 1.0}},
        ("attn_factor makes the factor 1.36636", "attention_factor is 1"),
        4,
    ),
    "attn_factor alone": ({"asked": YARN | {"attn_factor": 1.0}}, ("attn_factor", "attention_factor 1.13863"), 4),
    "a factor too small": (
        {"asked": YARN | {"factor": 2.0}, "asked_length": MILLION},
        ("is 1048576", "factor 2 covers 524288"),
        4,
    ),
    "a length without YaRN": ({"asked_length": 600_000}, ("is 600000", "without YaRN covers 262144"), 4),
    "a length far out": ({"shortcut": RopeShortcut(4.0), "asked_length": 1_500_000}, ("covers 1048576",), 6),
    "another theta": ({"asked": YARN | {"rope_theta": 10000.0}}, ("rope_theta is 10000:", "10000000"), 4),
    "full rotary": ({"asked": YARN | {"partial_rotary_factor": 1.0}}, ("partial_rotary_factor is 1:", "0.25"), 4),
    "another original length": (
        {"asked": YARN | {"original_max_position_embeddings": 32768}},
        ("original_max_position_embeddings is 32768", "262144"),
        4,
    ),
    "a factor that shrinks": ({"asked": YARN | {"factor": 0.5}}, ("factor is 0.5", "at least 1"), 4),
    "no factor": ({"asked": {"rope_type": "yarn"}}, ("factor is missing",), 4),
    "an unknown type": ({"asked": YARN | {"rope_type": "dynamic"}}, ("'dynamic'", "default, yarn"), 4),
    "no type": ({"asked": {"factor": 3.0}}, ("rope_type is missing", "yarn"), 3),
    "DeepSeek's keys": ({"asked": YARN | {"mscale": 1.0}}, ("mscale", "attention_factor"), 4),
    "two types": ({"asked": YARN | {"type": "linear"}}, ("type is 'linear'", "rope_type is 'yarn'"), 4),
    "a factor that does nothing": ({"asked": YARN | {"rope_type": "default"}}, ("does nothing", "'yarn'"), 4),
    "shortcut against factor": (
        {"asked": YARN, "shortcut": RopeShortcut(2.0)},
        ("factor is 4", "QWEN3NEXT_ROPE says 2"),
        2,
    ),
    "shortcut against plain rotary": (
        {"asked": {"rope_type": "default"}, "shortcut": RopeShortcut(2.0)},
        ("'default' while QWEN3NEXT_ROPE",),
        2,
    ),
    "shortcut against the checkpoint": ({"shortcut": RopeShortcut(4.0, 32768)}, ("QWEN3NEXT_ROPE", "262144"), 4),
    "text for a number": ({"asked": YARN | {"factor": "4"}}, ("factor is '4' (str)", "a number"), 4),
    "text for a flag": ({"asked": YARN | {"truncate": "no"}}, ("truncate is 'no' (str)", "true or false"), 4),
    "a bool for a number": ({"asked": YARN | {"factor": True}}, ("factor is True (bool)", "a number"), 4),
    "not a number": ({"asked": YARN | {"factor": float("nan")}}, ("factor is nan",), 4),
    "betas swapped": ({"asked": YARN | {"beta_fast": 1, "beta_slow": 32}}, ("beta_fast is 1", "beta_slow (32)"), 4),
    "a misspelt key": ({"asked": YARN | {"beta_faster": 32}}, ("beta_faster is not a field",), 4),
    "a dict a layer kind": ({"asked": {"full_attention": YARN, "rope_type": "yarn"}}, ("full_attention",), 4),
}


def printed_dict(message: str) -> dict[str, Any]:
    right: dict[str, Any] = json.loads(message[message.index("{") : -1])
    assert list(right) == ["rope_parameters"]
    parameters: dict[str, Any] = right["rope_parameters"]
    return parameters


def assert_refused(ask: Callable[[], object], parts: tuple[str, ...]) -> None:
    """Fails unless `ask` is refused with one sentence that names every part."""
    with pytest.raises(ConfigError) as caught:
        ask()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and "\n" not in message
