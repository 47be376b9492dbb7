"""Everything SGLang can be asked for that this model does not do is one sentence, and every field meant is there."""

from types import SimpleNamespace
from typing import Any

import pytest
from sglang import __version__
from sglang.srt.server_args import ServerArgs

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.sglang_integration.limits import LATER_LIMITS, LIMITS, check_supported
from tests.configs import new_form

FP8 = {"quant_method": "fp8", "weight_block_size": [128, 128], "activation_scheme": "dynamic"}
DEFAULTS = {"tp_size": 4, "ep_size": 1, "quantization": None, "moe_a2a_backend": "none", "pp_size": 1}


def check(config: dict[str, Any] | None = None, **arguments: Any) -> None:
    check_supported(parse_config(config or new_form()), SimpleNamespace(**DEFAULTS | arguments))


def test_what_is_served_passes() -> None:
    check()
    check(ep_size=4)
    check(speculative_algorithm="NEXTN", speculative_eagle_topk=1)
    check(quantization="unquant")
    check(new_form(quantization_config=FP8), quantization="fp8")


@pytest.mark.parametrize(
    ("asked", "remedy"),
    [
        ({"pp_size": 2}, "--tp-size"),
        ({"enable_dp_attention": True}, "--tp-size"),
        ({"attn_dp_size": 2}, "--tp-size"),
        ({"attn_cp_size": 2}, "--tp-size"),
        ({"ep_size": 2}, "--tp-size (4)"),
        ({"enable_lora": True}, "merge the adapter"),
        ({"lora_paths": ["a=b"]}, "merge the adapter"),
        ({"speculative_algorithm": "EAGLE3"}, "NEXTN"),
        ({"speculative_eagle_topk": 4}, "NEXTN"),
        ({"moe_a2a_backend": "deepep"}, "drop it"),
        ({"ep_num_redundant_experts": 8}, "drop it"),
        ({"enable_two_batch_overlap": True}, "one batch"),
        ({"enable_return_aux_hidden_states": True}, "last hidden states"),
        ({"quantization": "fp8"}, "FP8 checkpoint"),
    ],
)
def test_the_rest_is_refused_with_flag_value_and_remedy(asked: dict[str, Any], remedy: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(**asked)
    sentence = str(caught.value)
    ((field, value),) = asked.items()
    assert sentence.startswith(f"--{field.replace('_', '-')} is {value}: ")
    assert remedy in sentence
    assert sentence.endswith("QWEN3NEXT_PLUGIN=0 to run the stock engine.")


@pytest.mark.parametrize("quantization", [{"quant_method": "fp8"}, FP8 | {"weight_block_size": [64, 64]}])
def test_other_quantisations_are_refused_by_name(quantization: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"^quantization_config is {quantization['quant_method']}.*128, 128"):
        check(new_form(quantization_config=quantization))


def test_another_method_for_an_fp8_checkpoint_is_refused() -> None:
    with pytest.raises(ConfigError, match="--quantization is awq: the checkpoint is fp8"):
        check(new_form(quantization_config=FP8), quantization="awq")


def test_sglang_has_the_fields() -> None:
    arguments = ServerArgs(model_path="any")
    later = {name for limit in LATER_LIMITS for name in limit.fields}
    assert all(hasattr(arguments, name) for limit in LIMITS for name in limit.fields)
    assert {name for name in later if hasattr(arguments, name)} == (set() if __version__ == "0.5.20" else later)
