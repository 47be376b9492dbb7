"""What vLLM would serve as Qwen3-Next: ``python -m qwen3next_plugin.vllm_integration.inquiry``, run by the doctor.

The last line of its standard output is this module's name and a JSON object: ``kind`` is "active", "stock", "refused"
or "broken", ``found`` the class, the refusal's sentence or the error.
"""

import json

from qwen3next_plugin.errors import PluginError

ARCHITECTURE = "Qwen3NextForCausalLM"
NAME = f"{__package__}.inquiry"


def ask() -> dict[str, str]:
    """Load plugins as every vLLM process does, then the class that the registry has for the model."""
    try:
        from vllm.model_executor.models.registry import ModelRegistry
        from vllm.plugins import load_general_plugins

        load_general_plugins()
        model = ModelRegistry.models[ARCHITECTURE].load_model_cls()
    except PluginError as error:
        return {"kind": "refused", "found": str(error)}
    except Exception as error:
        return {"kind": "broken", "found": f"{type(error).__name__}: {error}"}
    ours = model.__module__.startswith(f"{__package__}.")
    return {"kind": "active" if ours else "stock", "found": f"{model.__module__}:{model.__qualname__}"}


if __name__ == "__main__":
    print(f"\n{NAME} {json.dumps(ask())}", flush=True)
