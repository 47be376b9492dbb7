"""What `qwen3next bench` hangs into vLLM."""

import subprocess
import sys

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
