"""What is read of an engine's log: how far its start is, why it failed, whether the plugin is active."""

from pathlib import Path

import pytest

from qwen3next_plugin.serve.engine_process import activation_line, cause_of_death, phase_of
from qwen3next_plugin.serve.pins import STAND_INS


@pytest.mark.parametrize(
    ("line", "phase"),
    [
        ("INFO 11-23 [config.py] Resolved architecture: Qwen3NextForCausalLM", "reading the model's configuration"),
        ("INFO 11-23 [gpu_worker.py] Starting to load model /m", "loading weights"),
        ("INFO 11-23 [kv_cache.py] GPU KV cache size: 1,024 tokens", "sizing the cache and warming up"),
        ("[2026-11-23 01:38:25] server_args={'model_path': '/m'}", "starting its processes"),
        ("[2026-11-23 01:38:55] Load weight begin. avail mem=21.38 GB", "loading weights"),
        ("[2026-11-23 01:38:55] Load weight end. elapsed=0.06 s", "weights are loaded"),
        ("[2026-11-23 01:38:55] KV Cache is allocated. dtype: torch.bfloat16", "sizing the cache and warming up"),
        ("[2026-11-23 01:38:55] INFO:     Started server process [19921]", "opening the API"),
        ("[2026-11-23 01:38:53] Init parallel begin.", None),
    ],
)
def test_how_far_a_start_is(line: str, phase: str | None) -> None:
    assert phase_of(line) == phase


NOISE = f"""\
[2026-11-23 01:37:24] Ignore import error when loading sglang.srt.models.qwen3_5: no such operation
TEST AID: {STAND_INS} stands in for sgl_kernel and torchvision; this server is for tests only
"""


@pytest.mark.parametrize(
    ("end", "cause"),
    [
        ("qwen3next-plugin: no such hook in sglang 0.5.23.\n", "no such hook in sglang 0.5.23."),
        (f"{STAND_INS}: torchvision 1.0 is installed.\n", "torchvision 1.0 is installed."),
        (
            "Scheduler hit an exception: Traceback\nAssertionError: lazy needs overlap\n",
            "AssertionError: lazy needs overlap",
        ),
        ("RuntimeError: first\nqwen3next-plugin: the reason\n", "the reason"),
        (
            "(APIServer) WARNING 11-27 [system_utils.py:255] It can cause `OSError: Too many open files`.\n"
            "(EngineCore) ERROR 11-27 [core.py:1510] ValueError: Free memory on device cuda:0\n",
            "ValueError: Free memory on device cuda:0",
        ),
        (
            "usage: launch_server.py [-h] --model-path MODEL_PATH\n"
            "launch_server.py: error: unrecognized arguments: --cuda-graph-max-bs 16\n",
            "unrecognized arguments: --cuda-graph-max-bs 16",
        ),
        ("killed\n", ""),
    ],
)
def test_why_a_start_failed(tmp_path: Path, end: str, cause: str) -> None:
    log = tmp_path / "log"
    log.write_text("ValueError: of the start before this one\n" + NOISE + end)
    assert cause_of_death(log, len("ValueError: of the start before this one\n")) == cause


def test_the_plugins_own_line(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(NOISE)
    assert activation_line(log, 0) is None
    log.write_text(NOISE + "[2026-11-23 02:33:20] qwen3next-plugin 0.1.0 active: sglang 0.5.20, torch 2.13.0+cpu\n")
    assert activation_line(log, 0) == "qwen3next-plugin 0.1.0 active: sglang 0.5.20, torch 2.13.0+cpu"
