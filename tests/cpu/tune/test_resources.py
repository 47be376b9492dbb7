"""The estimate of shared memory against what the compiler says."""

import json
from dataclasses import replace
from pathlib import Path

from qwen3next_plugin.kernels.gpus import KNOWN
from qwen3next_plugin.kernels.moe.config import Tile
from qwen3next_plugin.tune.model import shared_memory
from qwen3next_plugin.tune.problem import Problem
from tests.helpers import output_of

GPUS = {80: KNOWN["a100"], 89: KNOWN["rtx-4090"], 90: KNOWN["h200"], 100: KNOWN["b200"]}


def test_shared_memory_is_never_underestimated_and_hardly_over(tmp_path: Path) -> None:
    compiled = json.loads(output_of("tests.kernels.moe_config_compile", TRITON_CACHE_DIR=str(tmp_path))[-1])
    assert len(compiled) == 2 * 2 * (2 + 2 + 2)
    for mode, activation_bytes, block_m, product, sizes, capability, taken in compiled:
        gpu = replace(GPUS[capability], capability=divmod(capability, 10))
        shape = Problem(4, 4, 2, 512, 256, mode).products(activation_bytes)[product]
        estimate = shared_memory(gpu, shape, block_m, Tile(*sizes))
        assert taken <= estimate <= 1.05 * taken, (mode, activation_bytes, block_m, product, sizes, capability)
