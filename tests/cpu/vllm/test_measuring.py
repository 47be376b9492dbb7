"""What `qwen3next bench` hangs into vLLM."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from qwen3next_plugin.config import load_spec
from qwen3next_plugin.demo.random import tensor_shapes, write_random_checkpoint
from qwen3next_plugin.vllm_integration import measuring

ON_A_GPU = """
import sys
from unittest.mock import patch
from vllm.platforms import current_platform
import torch
from qwen3next_plugin.vllm_integration import measuring
event = torch.cuda.Event
with patch.object(type(current_platform), "is_cpu", lambda self: False):
    print(measuring._worker().__name__)
print("vllm.v1.worker.cpu_worker" in sys.modules, torch.cuda.Event is event)
"""


def test_a_gpu_server_never_imports_the_cpu_worker() -> None:
    """Its module puts placeholders over torch.cuda.Event and torch.cuda.Stream (seen to end a server on an H200)."""
    done = subprocess.run([sys.executable, "-c", ON_A_GPU], capture_output=True, text=True, check=True)
    assert done.stdout.split()[-3:] == ["Worker", "False", "True"]


PLUGINS_LOADED = """
import json, sys
from types import SimpleNamespace
import torch
from vllm.plugins import load_general_plugins

load_general_plugins()
heavy = {
    "vllm.model_executor.model_loader",
    "qwen3next_plugin.synthetic",
    "qwen3next_plugin.demo.random",
    "qwen3next_plugin.vllm_integration.synthetic",
}
imported = sorted(heavy & set(sys.modules))

from vllm.config import LoadConfig
from vllm.model_executor.model_loader import get_model_loader

class Model(torch.nn.Linear):
    def load_weights(self, weights):
        self.loaded = {name: list(tensor.shape) for name, tensor in weights}

model = Model(1, 1)
loader = get_model_loader(LoadConfig(load_format="qwen3next-synthetic"))
loader.load_weights(model, SimpleNamespace(model=sys.argv[1], quantization=None))
print(json.dumps({"imported": imported, "loaded": model.loaded}))
"""


@pytest.mark.parametrize("switch", ["0", "1"])
def test_plugins_import_no_loader_and_the_synthetic_format_loads(switch: str, tmp_path: Path) -> None:
    """vLLM loads plugins in its API server too, which has no use for weights."""
    checkpoint = write_random_checkpoint(tmp_path / "tiny", "tiny", weights=False)
    done = subprocess.run(
        [sys.executable, "-c", PLUGINS_LOADED, str(checkpoint)],
        env=os.environ | {"QWEN3NEXT_PLUGIN": switch, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        check=True,
    )
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["imported"] == []
    expected = {
        name: list(shape) for name, shape in tensor_shapes(load_spec(checkpoint)) if not name.startswith("mtp.")
    }
    assert found["loaded"] == expected


def test_steps_and_facts_are_recorded_of_functions_that_others_have_wrapped(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM traces both functions where OpenTelemetry is installed; a second call of the plugin adds nothing."""
    from vllm.v1.core.sched.scheduler import Scheduler

    class Worker:
        def compile_or_warm_up_model(self) -> str:
            return "compiled"

    class Record:
        steps: list[tuple[int, ...]] = []
        known: dict[str, str] = {}

        def step(self, *step: int) -> None:
            self.steps.append(step)

        def facts(self, **facts: str) -> None:
            self.known |= facts

    def traced(function: Any) -> Any:
        return functools.wraps(function)(lambda *args: function(*args))

    record: Any = Record()
    monkeypatch.setattr(measuring, "_worker", lambda: Worker)
    monkeypatch.setattr(measuring, "_facts", lambda worker: {"model_class": "Model"})
    monkeypatch.setattr(measuring, "records_experts", lambda: False)
    monkeypatch.setattr(Worker, "compile_or_warm_up_model", traced(Worker.compile_or_warm_up_model))
    monkeypatch.setattr(Scheduler, "update_from_output", traced(lambda self, scheduled, output: "updated"))
    for _ in range(2):
        measuring._watch_scheduler(record)
        measuring._watch_workers(record)
    monkeypatch.setattr(Scheduler, "update_from_output", traced(Scheduler.update_from_output))
    measuring._watch_scheduler(record)

    scheduled = SimpleNamespace(num_scheduled_tokens={"a": 3, "b": 1}, total_num_scheduled_tokens=4)
    assert Scheduler.update_from_output(None, scheduled, None) == "updated"
    assert Worker().compile_or_warm_up_model() == "compiled"
    assert record.steps == [(2, 4, 3)]
    assert record.known == {"model_class": "Model"}
