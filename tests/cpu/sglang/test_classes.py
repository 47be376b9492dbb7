"""What this plugin's classes are made of."""

from qwen3next_plugin import sglang_integration
from tests.own_classes import assert_none_derives_from

# SGLang's models (Qwen3-Next among them), Gated DeltaNet backends and MoE blocks: derived from nowhere.
FOREIGN = (
    "sglang.srt.models",
    "sglang.srt.layers.moe",
    "sglang.srt.layers.attention.linear",
    "sglang.srt.layers.attention.fla",
)


def test_no_class_derives_from_the_engines_model_backend_or_experts() -> None:
    assert_none_derives_from(sglang_integration, FOREIGN)
