"""Tile sizes of the grouped products: measured ones from a file where there is one, else a small table.

A file `kernels/configs/<gpu>/moe_E=512_H=2048_I=512_bfloat16.json` maps a number of tokens to a `MoeConfig` as nested
JSON; the entry with the nearest number of tokens is used.
"""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class Tile:
    """Columns and depth of a product's tile, and how many warps and pipeline stages run it."""

    block_n: int
    block_k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class MoeConfig:
    """Rows of a tile (one expert's tokens; shared by both products) and each product's tile."""

    block_m: int
    gate_up: Tile
    down: Tile


def default_config(num_pairs: int, num_experts: int, activation_bytes: int) -> MoeConfig:
    """The table, by the rows an expert gets on average and the bytes of one activation (1 is FP8).

    Every entry fits 99 KiB of shared memory, the least that a supported GPU has.
    """
    rows = num_pairs / max(num_experts, 1)
    depth = 128 // activation_bytes
    if rows <= 16:
        return MoeConfig(16, Tile(64, depth, 4, 3), Tile(64, depth, 4, 4))
    if rows <= 32:
        return MoeConfig(32, Tile(64, depth, 4, 3), Tile(64, depth, 4, 4))
    if rows <= 128:
        return MoeConfig(64, Tile(64, depth, 4, 3), Tile(128, depth, 4, 3))
    return MoeConfig(128, Tile(64, depth, 8, 3), Tile(128, depth, 8, 3))


def _parse(entry: dict[str, Any]) -> MoeConfig:
    return MoeConfig(entry["block_m"], Tile(**entry["gate_up"]), Tile(**entry["down"]))


@functools.lru_cache
def tuned_configs(folder: Path, gpu: str, experts: int, hidden: int, inner: int, dtype: str) -> dict[int, MoeConfig]:
    """The measured configs for one GPU and shape, by number of tokens; empty where nothing was measured."""
    path = folder / gpu.replace(" ", "_") / f"moe_E={experts}_H={hidden}_I={inner}_{dtype}.json"
    if not path.is_file():
        return {}
    return {int(tokens): _parse(entry) for tokens, entry in json.loads(path.read_text()).items()}


def choose_config(
    tokens: int, top_k: int, w13: torch.Tensor, activation_bytes: int, folder: Path = CONFIGS
) -> MoeConfig:
    """The config for `tokens` tokens with w13 [E, 2I, H] on its device and activations of so many bytes."""
    experts, double_inner, hidden = w13.shape
    if w13.is_cuda:
        gpu, dtype = torch.cuda.get_device_name(w13.device), str(w13.dtype).removeprefix("torch.")
        tuned = tuned_configs(folder, gpu, experts, hidden, double_inner // 2, dtype)
        if tuned:
            return tuned[min(tuned, key=lambda measured: abs(measured - tokens))]
    return default_config(tokens * top_k, experts, activation_bytes)
