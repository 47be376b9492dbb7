"""What SGLang would serve as Qwen3-Next: ``python -m qwen3next_plugin.sglang_integration.inquiry``, run by the doctor.

The last line of its standard output is this module's name and a JSON object: ``kind`` is "active", "stock", "refused"
or "broken", ``found`` the class, the refusal's sentence or the error.
"""

import json
import os

from qwen3next_plugin.errors import PluginError

ARCHITECTURE = "Qwen3NextForCausalLM"
NAME = f"{__package__}.inquiry"


def ask() -> dict[str, str]:
    """Load plugins as every SGLang process does, then the class that the registry has for the model."""
    try:
        from sglang.srt.plugins import load_plugins

        load_plugins()
        from sglang.srt.models.registry import ModelRegistry

        model, _ = ModelRegistry.resolve_model_cls([ARCHITECTURE])
    except SystemExit as end:
        # A refusal ends the process, since SGLang would swallow anything milder.
        return {"kind": "refused" if isinstance(end.__cause__, PluginError) else "broken", "found": str(end.__cause__)}
    except Exception as error:
        return {"kind": "broken", "found": f"{type(error).__name__}: {error}"}
    found = f"{model.__module__}:{model.__qualname__}"
    if model.__module__.startswith(f"{__package__}."):
        return {"kind": "active", "found": found}
    allowed = os.environ.get("SGLANG_PLUGINS", "")
    if allowed and "qwen3next" not in (name.strip() for name in allowed.split(",")):
        found += f" (SGLANG_PLUGINS={allowed} leaves the plugin qwen3next out)"
    return {"kind": "stock", "found": found}


if __name__ == "__main__":
    print(f"\n{NAME} {json.dumps(ask())}", flush=True)
