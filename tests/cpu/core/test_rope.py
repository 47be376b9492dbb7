"""Rotary tables against transformers' frequencies, and against the formula in float64."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRotaryEmbedding

from qwen3next_plugin.config import RopeSpec, parse_config
from qwen3next_plugin.rope import attention_factor, build_cos_sin, inverse_frequencies
from tests.configs import new_form
from tests.helpers import relative_error

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8192}
ROTARIES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default"},
    "yarn": YARN,
    "yarn, attention factor": YARN | {"attention_factor": 0.7},
    "yarn, betas": YARN | {"beta_fast": 20, "beta_slow": 3.0},
    "yarn, no truncation": YARN | {"truncate": False},
    "yarn, mscale": YARN | {"mscale": 0.9, "mscale_all_dim": 1.4},
    "yarn, published 1M": YARN | {"original_max_position_embeddings": 262144},
    "yarn, factor 1": YARN | {"factor": 1.0},
    "yarn, no ramp": YARN | {"original_max_position_embeddings": 4, "factor": 2.0},
}


def _config(rotary: dict[str, Any], theta: float = 1e7) -> dict[str, Any]:
    rope_parameters = {"rope_theta": theta, "partial_rotary_factor": 0.25} | rotary
    return new_form(head_dim=256, max_position_embeddings=32768, rope_parameters=rope_parameters)


@pytest.mark.parametrize("name", ROTARIES)
def test_frequencies_and_factor_are_those_of_transformers(name: str) -> None:
    config = _config(ROTARIES[name])
    rope = parse_config(config).rope
    theirs = Qwen3NextConfig(**config)
    if rope.rope_type == "yarn":
        expected, factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    else:
        embedding = Qwen3NextRotaryEmbedding(theirs)
        expected, factor = embedding.inv_freq, embedding.attention_scaling
    ours = inverse_frequencies(rope, 64)
    assert ours.dtype is torch.float64 and ours.shape == (32,)
    torch.testing.assert_close(ours.float(), expected, rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(factor, rel=1e-12)


@pytest.mark.parametrize("name", ROTARIES)
def test_table_is_that_of_transformers_where_float32_angles_are_right(name: str) -> None:
    config = _config(ROTARIES[name])
    table = build_cos_sin(parse_config(config).rope, 64, 100)
    cos, sin = Qwen3NextRotaryEmbedding(Qwen3NextConfig(**config))(torch.zeros(1, 1), torch.arange(100)[None])
    assert table.dtype is torch.float32 and table.shape == (100, 64)
    torch.testing.assert_close(table[:, :32], cos[0, :, :32], rtol=0, atol=1e-5)
    torch.testing.assert_close(table[:, 32:], sin[0, :, :32], rtol=0, atol=1e-5)


@given(st.floats(1.5, 1e8), st.integers(1, 64), st.integers(1, 5000))
def test_far_positions_are_rounded_once(theta: float, pairs: int, step: int) -> None:
    rope = RopeSpec(theta, 0.25)
    positions = 65536 + 2 * step
    table = build_cos_sin(rope, 2 * pairs, positions)[-step:]
    exponents = torch.arange(pairs, dtype=torch.float64) / pairs
    angles = torch.arange(positions - step, positions, dtype=torch.float64)[:, None] / theta**exponents
    assert relative_error(table, torch.cat([angles.cos(), angles.sin()], dim=1)) < 5e-8


def test_yarn_keeps_fast_pairs_and_slows_slow_ones() -> None:
    plain = inverse_frequencies(parse_config(_config(ROTARIES["default"])).rope, 64)
    ratio = inverse_frequencies(parse_config(_config(YARN)).rope, 64) / plain
    assert ratio[0] == 1.0 and ratio[-1] == pytest.approx(0.25)
    assert bool((ratio.diff() <= 1e-15).all())


def test_an_engines_default_dtype_does_not_matter() -> None:
    rope = parse_config(_config(YARN)).rope
    expected = build_cos_sin(rope, 64, 10)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(build_cos_sin(rope, 64, 10), expected)
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_rope_that_the_parser_would_refuse_is_refused() -> None:
    for rope in (RopeSpec(1e7, 0.25, "linear", factor=2.0), RopeSpec(1e7, 0.25, "yarn", factor=2.0)):
        with pytest.raises(ValueError, match="rope_type"):
            inverse_frequencies(rope, 64)
