"""What this plugin's classes are made of."""

import inspect
from importlib import import_module
from pkgutil import iter_modules

from qwen3next_plugin import sglang_integration

# SGLang's models (Qwen3-Next among them), Gated DeltaNet backends and MoE blocks: derived from nowhere.
FOREIGN = (
    "sglang.srt.models",
    "sglang.srt.layers.moe",
    "sglang.srt.layers.attention.linear",
    "sglang.srt.layers.attention.fla",
)
MODULES = [f"{sglang_integration.__name__}.{module.name}" for module in iter_modules(sglang_integration.__path__)]


def own_classes() -> list[type]:
    classes = [
        item
        for name in MODULES
        for _, item in inspect.getmembers(import_module(name), inspect.isclass)
        if item.__module__ == name
    ]
    assert len(classes) > 10
    return classes


def test_no_class_derives_from_the_engines_model_backend_or_experts() -> None:
    for item in own_classes():
        for base in item.__mro__:
            assert not base.__module__.startswith(FOREIGN), f"{item} derives from {base}"
