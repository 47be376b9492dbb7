"""What users ask of the rope, completed from the checkpoint or refused with the dict that would have been right."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import Qwen3NextConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from qwen3next_plugin.config import AttentionSpec, parse_config
from qwen3next_plugin.demo.shapes import config_of
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.kernels.rope import qk_norm_rope
from qwen3next_plugin.reference.layers import project_qkv
from qwen3next_plugin.rope import attention_factor, build_cos_sin, inverse_frequencies
from qwen3next_plugin.rope_request import CompleteRope, RopeShortcut, check_context, complete_rope
from tests.configs import new_form, old_form
from tests.helpers import relative_error
from tests.wrong_ropes import MILLION, TRAINED, WRONG, YARN, printed_dict

PUBLISHED = config_of("80b")
USUAL = 1.138629436111989  # 0.1 ln(4) + 1, Peng et al. 2023, eq. 22
WHOLE = {
    "rope_type": "yarn",
    "rope_theta": 1e7,
    "partial_rotary_factor": 0.25,
    "factor": 4.0,
    "original_max_position_embeddings": TRAINED,
    "attention_factor": pytest.approx(USUAL, rel=1e-12),
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": True,
}


@pytest.mark.parametrize(
    "request_",
    [
        {"asked": YARN},
        {"asked": {"type": "yarn", "factor": 4}},
        {"asked": YARN | {"rope_theta": 10000000, "partial_rotary_factor": 0.25, "truncate": None}},
        {"asked": YARN | {"attention_factor": USUAL, "attn_factor": 1.0}},
        {"asked": {"rope_type": "yarn"}, "asked_length": MILLION},
        {"shortcut": RopeShortcut(4.0)},
        {"shortcut": RopeShortcut(4.0, TRAINED), "asked": YARN},
    ],
)
@pytest.mark.parametrize("form", ["published", "old", "new"])
def test_whatever_is_given_the_dict_is_whole(request_: dict[str, Any], form: str) -> None:
    lengths = {"max_position_embeddings": TRAINED}
    checkpoint = {"published": PUBLISHED, "old": old_form(**lengths), "new": new_form(**lengths)}[form]
    found = complete_rope(checkpoint, **request_)
    assert (found.parameters, found.context_length) == (WHOLE, MILLION)
    completed = checkpoint | {"rope_parameters": found.parameters, "rope_scaling": None}
    assert parse_config(completed).rope == found.spec
    assert complete_rope(checkpoint, asked=found.parameters).parameters == found.parameters


def test_values_that_may_differ_are_kept() -> None:
    mine = {"attention_factor": 0.9, "beta_fast": 16.0, "beta_slow": 2.0, "truncate": False}
    found = complete_rope(PUBLISHED, asked=YARN | mine, asked_length=500_000)
    assert found.parameters == WHOLE | mine
    assert found.context_length == 500_000


def test_the_checkpoints_own_rope_where_nothing_is_asked() -> None:
    plain = {"rope_type": "default", "rope_theta": 1e6, "partial_rotary_factor": 0.5}
    found = complete_rope(old_form(rope_theta=1e6, partial_rotary_factor=0.5))
    assert (found.parameters, found.context_length) == (plain, 1024)
    edited = PUBLISHED | {"rope_scaling": YARN}
    assert complete_rope(edited).parameters == WHOLE
    assert complete_rope(edited).context_length == MILLION
    assert complete_rope(edited | {"max_position_embeddings": 2 * TRAINED}).context_length == 2 * TRAINED
    assert complete_rope(edited, asked={"rope_type": "default"}).context_length == TRAINED
    assert complete_rope(edited, shortcut=RopeShortcut(2.0)).context_length == 2 * TRAINED


def test_an_extended_length_in_config_json_does_not_cover_for_a_smaller_factor() -> None:
    edited = PUBLISHED | {"rope_scaling": YARN} | {"max_position_embeddings": MILLION}
    assert complete_rope(edited, asked_length=700_000).context_length == 700_000
    assert complete_rope(edited, shortcut=RopeShortcut(2.0)).context_length == 2 * TRAINED
    with pytest.raises(ConfigError, match="is 700000 while YaRN with factor 2 covers 524288"):
        complete_rope(edited, shortcut=RopeShortcut(2.0), asked_length=700_000)


@given(st.floats(1.0, 16.0), st.integers(16, 1 << 20))
def test_the_context_is_the_trained_one_times_the_factor(factor: float, trained: int) -> None:
    found = complete_rope(old_form(max_position_embeddings=trained), shortcut=RopeShortcut(factor))
    assert abs(found.context_length - factor * trained) <= 0.5
    assert found.parameters["original_max_position_embeddings"] == trained


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_dict_is_refused_with_the_right_one(name: str) -> None:
    request, parts, factor = WRONG[name]
    with pytest.raises(ConfigError) as caught:
        complete_rope(PUBLISHED, **request)
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert message.endswith(".") and "\n" not in message
    right = printed_dict(message)
    found = complete_rope(PUBLISHED, asked=right)
    assert found.parameters == right
    assert right["factor"] == factor and found.context_length >= request.get("asked_length", 0)


def test_more_context_than_a_complete_rope_covers() -> None:
    rope = complete_rope(PUBLISHED, shortcut=RopeShortcut(2.0))
    check_context(rope, 2 * TRAINED, "--length")
    with pytest.raises(ConfigError, match="--length is 524289 while YaRN with factor 2 covers 524288") as caught:
        check_context(rope, 2 * TRAINED + 1, "--length")
    assert printed_dict(str(caught.value))["factor"] == 3
    with pytest.raises(ConfigError, match="the checkpoint without YaRN covers 262144"):
        check_context(complete_rope(PUBLISHED), TRAINED + 1, "--length")


@pytest.mark.parametrize("factor", [1.0, 1.5, 2.0, 2.7, 3.0, 4.0])
def test_frequencies_and_factor_are_those_of_transformers(factor: float) -> None:
    """Given the guide's short dict; transformers gets it too, with base and partial factor as its config has them."""
    rope = complete_rope(PUBLISHED, asked=YARN | {"factor": factor}).spec
    theirs = Qwen3NextConfig(
        **new_form(
            head_dim=256,
            max_position_embeddings=TRAINED,
            rope_parameters=YARN | {"factor": factor, "rope_theta": 1e7, "partial_rotary_factor": 0.25},
        )
    )
    expected, their_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    positions = torch.tensor([[1], [TRAINED - 1], [TRAINED], [1_000_000], [MILLION]], dtype=torch.float64)
    angles = positions * inverse_frequencies(rope, 64)
    torch.testing.assert_close(angles, positions * expected.double(), rtol=1e-6, atol=0)
    assert attention_factor(rope) == pytest.approx(their_factor, rel=1e-6)


@pytest.fixture(scope="module")
def million() -> tuple[CompleteRope, torch.Tensor]:
    """The guide's rope, and its table as the engines' layers read it."""
    rope = complete_rope(PUBLISHED, asked=YARN)
    return rope, build_cos_sin(rope.spec, 64, 1_000_001)


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_rotary_outputs_are_the_oracles(backend: str, device: str, million: tuple[CompleteRope, torch.Tensor]) -> None:
    torch.manual_seed(0)
    rope, table = million
    assert table.dtype is torch.float32
    sizes = AttentionSpec(num_heads=2, num_kv_heads=1, head_dim=256, rotary_dim=64)
    positions = torch.tensor([0, TRAINED - 1, TRAINED, 1_000_000])
    x = torch.randn(1, 4, 32, dtype=torch.float64)
    weights = {
        "self_attn.qkv_proj.weight": torch.randn(6 * 256, 32, dtype=torch.float64),
        "self_attn.q_norm.weight": torch.randn(256, dtype=torch.float64) * 0.3,
        "self_attn.k_norm.weight": torch.randn(256, dtype=torch.float64) * 0.3,
    }
    angles = positions[:, None].double() * inverse_frequencies(rope.spec, 64)
    cos, sin = angles.cos() * attention_factor(rope.spec), angles.sin() * attention_factor(rope.spec)
    expected_q, expected_k, _, _ = project_qkv(x, weights, sizes, 1e-6, cos, sin)
    q, k, _, _ = qk_norm_rope(
        (x[0] @ weights["self_attn.qkv_proj.weight"].T).float().to(device),
        weights["self_attn.q_norm.weight"].float().to(device),
        weights["self_attn.k_norm.weight"].float().to(device),
        table.to(device),
        positions.to(device),
        num_heads=2,
        num_kv_heads=1,
        head_dim=256,
        eps=1e-6,
        backend=backend,
    )
    for place in range(4):
        assert relative_error(q[place], expected_q[0, place].flatten()) < 1e-6
        assert relative_error(k[place], expected_k[0, place].flatten()) < 1e-6
