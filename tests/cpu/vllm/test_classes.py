"""What this plugin's classes are made of, and what torch.compile and CUDA graphs are told of its op."""

from importlib import import_module

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from qwen3next_plugin import vllm_integration
from qwen3next_plugin.settings import read_settings
from tests.own_classes import assert_none_derives_from

# vLLM's Qwen3-Next model, Gated DeltaNet layers and MoE blocks: called nowhere, derived from nowhere.
FOREIGN = (
    "vllm.model_executor.models.qwen",
    "vllm.model_executor.layers.mamba.gdn",
    "vllm.model_executor.layers.fused_moe",
)


def test_no_class_derives_from_the_engines_model_layer_or_experts() -> None:
    assert_none_derives_from(vllm_integration, FOREIGN)


@pytest.mark.parametrize("name", ["Qwen3NextForCausalLM", "Qwen3NextMTP"])
def test_the_registry_holds_this_plugins_classes(name: str) -> None:
    from vllm.model_executor.models.registry import ModelRegistry

    vllm_integration.register()
    vllm_integration.register()  # vLLM may call it in one process more than once
    assert ModelRegistry.models[name].load_model_cls().__module__.startswith(vllm_integration.__name__)


def test_what_depends_on_rows_splits_piecewise_graphs_once() -> None:
    from vllm.config import CompilationConfig

    from qwen3next_plugin.vllm_integration.names import SPLITTING_OPS
    from qwen3next_plugin.vllm_integration.registration import activate

    for _ in range(2):
        activate(read_settings({}))
    assert [CompilationConfig._attention_ops.count(op) for op in SPLITTING_OPS] == [1, 1]


def test_the_core_says_what_it_writes_and_traces_without_running() -> None:
    from vllm.utils.torch_utils import _encode_layer_name

    import_module(f"{vllm_integration.__name__}.gdn_layer")
    op = torch.ops.vllm.qwen3next_plugin_gdn_core.default
    written = [a.name for a in op._schema.arguments if a.alias_info is not None and a.alias_info.is_write]
    assert written == ["out"]
    with FakeTensorMode():
        qkvz, ba, out = torch.empty(3, 8), torch.empty(3, 2), torch.empty(3, 1, 2)
        assert op(qkvz, ba, out, _encode_layer_name("no such layer")) is None
