"""What vLLM would serve as Qwen3-Next: ``python -m qwen3next_plugin.vllm_integration.inquiry``, run by the doctor."""

from qwen3next_plugin.inquiry import ARCHITECTURE, answer, tell

NAME = f"{__package__}.inquiry"


def ask() -> dict[str, str]:
    """Load plugins as every vLLM process does, then the class that the registry has for the model."""
    return answer(_model_class, f"{__package__}")


def _model_class() -> type:
    from vllm.model_executor.models.registry import ModelRegistry
    from vllm.plugins import load_general_plugins

    load_general_plugins()
    model: type = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    return model


if __name__ == "__main__":
    tell(NAME, ask())
