"""FP8 slices that end inside a block: vLLM's own layers refuse them, the shared expert is built of this plugin's."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from vllm import distributed
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.model_executor.layers.quantization.fp8 import Fp8Config
from vllm.model_executor.layers.quantization.utils.fp8_utils import validate_fp8_block_shape

from qwen3next_plugin.config import parse_config
from qwen3next_plugin.errors import PluginError
from qwen3next_plugin.layers_fp8 import Fp8Columns, Fp8Rows
from qwen3next_plugin.layers_moe import GatedMLP
from qwen3next_plugin.vllm_integration import moe
from qwen3next_plugin.vllm_integration.model import Qwen3NextForCausalLM
from tests.configs import new_form

SHARED = "model.layers.3.mlp.shared_expert"


def parallel_layers(monkeypatch: pytest.MonkeyPatch, rank: int, size: int, ignored: list[str]) -> Any:
    """What one rank of `size` builds from, its checkpoint in FP8 with 128x128 blocks but for the ignored modules."""
    monkeypatch.setattr(moe, "get_tensor_model_parallel_rank", lambda: rank)
    monkeypatch.setattr(moe, "get_tensor_model_parallel_world_size", lambda: size)
    quant = Fp8Config(True, "dynamic", ignored, [128, 128])
    quant.packed_modules_mapping = Qwen3NextForCausalLM.packed_modules_mapping
    parallel = SimpleNamespace(enable_expert_parallel=False)
    in_config = {"quant_method": "fp8", "weight_block_size": [128, 128], "modules_to_not_convert": ignored}
    spec = parse_config(new_form(quantization_config=in_config))
    return moe.parallel_layers(spec, SimpleNamespace(parallel_config=parallel, quant_config=quant))


def test_vllms_own_layers_refuse_half_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    """Why the shared expert is not left to them; once this fails, it could be."""
    monkeypatch.setattr(distributed, "get_tensor_model_parallel_world_size", lambda: 8)
    layer = torch.nn.Module()
    with pytest.raises(ValueError, match="output_partition_size = 64 is not divisible"):
        validate_fp8_block_shape(layer, 2048, 1024, 2048, [64, 64], [128, 128])
    with pytest.raises(ValueError, match="input_size_per_partition = 64 is not divisible"):
        validate_fp8_block_shape(layer, 512, 2048, 64, [2048], [128, 128])


def test_the_shared_expert_of_eight_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = parallel_layers(monkeypatch, 5, 8, ["lm_head"])
    with set_current_vllm_config(VllmConfig()):
        mlp = GatedMLP(256, 512, layers, SHARED, reduce_results=False)
    assert isinstance(mlp.gate_up_proj, Fp8Columns) and isinstance(mlp.down_proj, Fp8Rows)
    shapes = {name: list(parameter.shape) for name, parameter in mlp.named_parameters()}
    assert shapes == {
        "gate_up_proj.weight": [128, 256],
        "gate_up_proj.weight_scale_inv": [2, 2],
        "down_proj.weight": [256, 64],
        "down_proj.weight_scale_inv": [2, 1],
    }


def test_what_the_checkpoint_leaves_out_of_fp8_stays_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    ignored = [f"{SHARED}.{name}_proj" for name in ("gate", "up", "down")]
    layers = parallel_layers(monkeypatch, 5, 8, ignored)
    assert layers.fp8_block(f"{SHARED}.gate_up_proj") is layers.fp8_block(f"{SHARED}.down_proj") is None
    assert layers.fp8_block("model.layers.2.mlp.shared_expert.gate_up_proj") == 128
    layers.quant_config.weight_block_size = None
    with pytest.raises(PluginError, match=r"layers.2.mlp.experts is stored as fp8 .*stock vLLM"):
        layers.fp8_block("model.layers.2.mlp.experts")


@pytest.mark.parametrize("size", [1, 2, 8])
def test_a_list_in_short_is_taken_at_its_word(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM would look for these entries as whole names, and build FP8 layers for weights that are not."""
    layers = parallel_layers(monkeypatch, 0, size, ["mlp.shared_expert", "linear_attn.in_proj_ba", "mtp.layers.0"])
    for module in (f"{SHARED}.gate_up_proj", "model.layers.0.linear_attn.in_proj_ba", "mtp.layers.0.mlp.experts"):
        assert layers.options(module)["quant_config"] is layers.fp8_block(module) is None
    for module in ("model.layers.0.linear_attn.in_proj_qkvz", "model.layers.0.mlp.experts"):
        assert layers.options(module)["quant_config"] is layers.quant_config and layers.fp8_block(module) == 128
