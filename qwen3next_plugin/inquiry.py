"""What an engine would serve as Qwen3-Next, as the adapters' ``inquiry`` modules tell the doctor.

The last line of their standard output is the module's name and a JSON object: ``kind`` is "active", "stock", "refused"
or "broken", ``found`` the class, the refusal's sentence or the error.
"""

import json
from collections.abc import Callable

from .errors import PluginError

ARCHITECTURE = "Qwen3NextForCausalLM"


def answer(model_class: Callable[[], type], package: str) -> dict[str, str]:
    """The answer from what ``model_class`` returns or raises; the classes of ``package`` are this plugin's."""
    try:
        model = model_class()
    except PluginError as error:
        return {"kind": "refused", "found": str(error)}
    except SystemExit as end:
        # How a refusal ends the process of an engine that swallows anything milder.
        return {"kind": "refused" if isinstance(end.__cause__, PluginError) else "broken", "found": str(end.__cause__)}
    except Exception as error:
        return {"kind": "broken", "found": f"{type(error).__name__}: {error}"}
    ours = model.__module__.startswith(f"{package}.")
    return {"kind": "active" if ours else "stock", "found": f"{model.__module__}:{model.__qualname__}"}


def tell(name: str, found: dict[str, str]) -> None:
    """Print the line that the doctor reads."""
    print(f"\n{name} {json.dumps(found)}", flush=True)
