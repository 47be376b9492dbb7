"""What SGLang would serve as Qwen3-Next: ``python -m qwen3next_plugin.sglang_integration.inquiry``, for the doctor."""

import os

from qwen3next_plugin.inquiry import ARCHITECTURE, answer, tell

NAME = f"{__package__}.inquiry"


def ask() -> dict[str, str]:
    """Load plugins as every SGLang process does, then the class that the registry has for the model."""
    found = answer(_model_class, f"{__package__}")
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if found["kind"] == "stock" and allowed and "qwen3next" not in (name.strip() for name in allowed.split(",")):
        found["found"] += f" (SGLANG_PLUGINS={allowed} leaves the plugin qwen3next out)"
    return found


def _model_class() -> type:
    from sglang.srt.plugins import load_plugins

    load_plugins()
    from sglang.srt.models.registry import ModelRegistry

    model: type
    model, _ = ModelRegistry.resolve_model_cls([ARCHITECTURE])
    return model


if __name__ == "__main__":
    tell(NAME, ask())
