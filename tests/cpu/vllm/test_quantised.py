"""What vLLM makes of a checkpoint in packed integers: a method of this plugin's, and unquantised layers of its own."""

from pathlib import Path

import pytest
import torch
from vllm.config import ModelConfig
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config

from qwen3next_plugin import vllm_integration
from qwen3next_plugin.demo.random import write_random_checkpoint
from qwen3next_plugin.errors import ConfigError
from qwen3next_plugin.quantization import NAME, check_asked
from qwen3next_plugin.vllm_integration.quantization import PackedIntegers


def chosen(path: Path, asked: str | None = None) -> str | None:
    """The method that vLLM settles on."""
    vllm_integration.register()
    method: str | None = ModelConfig(model=str(path), quantization=asked, dtype="float32").quantization
    return method


@pytest.mark.parametrize("kind", ["awq", "gptq", "gptq-int8", "w4a16", "w8a8"])
def test_the_method_is_ours(kind: str, tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, "tiny", quantization=kind, weights=False)
    assert chosen(path) == NAME
    assert get_quantization_config(NAME) is PackedIntegers


def test_by_any_of_its_names_and_no_other(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, "tiny", quantization="awq", weights=False)
    assert chosen(path, "awq_marlin") == chosen(path, "moe_wna16") == NAME
    values = {"model_type": "qwen3_next"}
    quant = {"quant_method": "awq", "bits": 4, "group_size": 32}
    assert PackedIntegers.override_quantization_method(quant, None, _Config(values)) is None, "nothing is quantised"
    assert PackedIntegers.override_quantization_method(quant, None) is None


def test_other_quantisations_stay_vllms(tmp_path: Path) -> None:
    path = write_random_checkpoint(tmp_path, "blocks", fp8=True, weights=False)
    assert chosen(path) == "fp8"


def test_a_method_that_is_not_the_checkpoints_is_refused(tmp_path: Path) -> None:
    from qwen3next_plugin.config import load_spec

    path = write_random_checkpoint(tmp_path, "tiny", quantization="gptq", weights=False)
    check_asked(load_spec(path), NAME)
    with pytest.raises(ConfigError, match=r"--quantization is auto_awq: the checkpoint is gptq.*drop it"):
        check_asked(load_spec(path), "auto_awq")


def test_vllms_own_layers_are_unquantised() -> None:
    layer = object.__new__(ReplicatedLinear)
    method = PackedIntegers.from_config({}).get_quant_method(layer, "model.layers.0.mlp.gate")
    assert isinstance(method, UnquantizedLinearMethod)
    assert PackedIntegers().get_quant_method(torch.nn.Linear(1, 1), "model.layers.3.self_attn.attn") is None


class _Config:
    def __init__(self, values: dict[str, str]) -> None:
        self.to_dict = lambda: values
