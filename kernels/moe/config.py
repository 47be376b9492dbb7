"""Tile sizes of the grouped products: from a file for this GPU and shape where there is one, else a small table.

`configs/<gpu>/E=512,H=2048,I=512,dtype=float8_e4m3fn.json` holds them by number of tokens, measured by `qwen3next tune
moe` or computed from the GPU's properties; the file says which. A user's own folder comes before the shipped one.
"""

import functools
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from ..gpus import gpu_slug
from ..tuned import checked_folder

CONFIGS = Path(__file__).resolve().parent / "configs"
FORMAT = 1

Source = Literal["measured", "model"]


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


@dataclass(frozen=True)
class Entry:
    """The config for so many tokens whose activations have so many bytes (1 is FP8) when they meet the weights."""

    tokens: int
    activation_bytes: int
    config: MoeConfig


@dataclass(frozen=True)
class ConfigFile:
    """What one file holds, and whether that was measured or computed ("model")."""

    source: Source
    entries: tuple[Entry, ...]


_user_folder: Path | None = None
_forced: MoeConfig | None = None


def use_folder(folder: Path | None) -> None:
    """Look for config files in `folder` before the shipped ones; None: only there. For a user's switch, read at start.

    Raises ValueError where there is no such folder, or one of its files for any GPU cannot be read.
    """
    global _user_folder
    if folder is not None:
        checked_folder(folder, "*/E=*.json", read_file, "qwen3next tune moe")
    _user_folder = folder


@contextmanager
def forced(config: MoeConfig) -> Iterator[None]:
    """Every call of `fused_moe` inside runs `config`, whatever files say: for measuring."""
    global _forced
    before, _forced = _forced, config
    try:
        yield
    finally:
        _forced = before


def is_forced() -> bool:
    """Whether a caller of `forced` wants its tiles used, however few the tokens are."""
    return _forced is not None


def default_config(num_pairs: int, num_experts: int, activation_bytes: int, integers: bool = False) -> MoeConfig:
    """The table, by the rows an expert gets on average and the bytes of one activation (1 is FP8 or INT8).

    Every entry fits 99 KiB of shared memory, the least that a supported GPU has. `integers` (INT4 and INT8 weights) has
    tiles of its own for few rows: those that `qwen3next_plugin.tune`'s estimates name first for nearly every GPU.
    """
    rows = num_pairs / max(num_experts, 1)
    depth = 128 // activation_bytes
    if integers and rows <= 32:
        return MoeConfig(16 if rows <= 16 else 32, Tile(64, 128, 4, 3), Tile(128, 128, 4, 3))
    if rows <= 16:
        return MoeConfig(16, Tile(64, depth, 4, 3), Tile(64, depth, 4, 4))
    if rows <= 32:
        return MoeConfig(32, Tile(64, depth, 4, 3), Tile(64, depth, 4, 4))
    if rows <= 128:
        return MoeConfig(64, Tile(64, depth, 4, 3), Tile(128, depth, 4, 3))
    return MoeConfig(128, Tile(64, depth, 8, 3), Tile(128, depth, 8, 3))


def weights_name(dtype: torch.dtype, activation_bytes: int) -> str:
    """What files call weights held in `dtype`: INT8 ones meet activations of one byte or wider ones."""
    if dtype is torch.int8:
        return "int8_w8a8" if activation_bytes == 1 else "int8_w8a16"
    return "int4_w4a16" if dtype is torch.uint8 else str(dtype).removeprefix("torch.")


def file_name(experts: int, hidden: int, inner: int, weights: str) -> str:
    """The file for the weights of one rank: w13 [experts, 2 * inner, hidden], named as `weights_name` does."""
    return f"E={experts},H={hidden},I={inner},dtype={weights}.json"


def config_object(config: MoeConfig) -> dict[str, Any]:
    """As JSON holds it; `parse_config` reads it back."""
    return asdict(config)


def parse_config(entry: dict[str, Any]) -> MoeConfig:
    """A config from its JSON. Raises KeyError or TypeError for anything else."""
    return MoeConfig(entry["block_m"], Tile(**entry["gate_up"]), Tile(**entry["down"]))


@functools.lru_cache
def read_file(path: Path) -> ConfigFile:
    """A config file. Raises ValueError naming the file if it is not one, so that a damaged one is never ignored."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != FORMAT or content["source"] not in ("measured", "model"):
            raise ValueError(f"format {content['format']} from {content['source']}")
        entries = tuple(
            Entry(int(entry["tokens"]), int(entry["activation_bytes"]), parse_config(entry["config"]))
            for entry in content["entries"]
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} is not a config file of format {FORMAT} ({type(error).__name__}: {error}): "
            "write it anew with `qwen3next tune moe`, or take it away"
        ) from None
    return ConfigFile(content["source"], entries)


def nearest(entries: tuple[Entry, ...], tokens: int, activation_bytes: int) -> MoeConfig | None:
    """The entry nearest by ratio (the smaller of two equally near) among those with such activations, if any is.

    Others are left out because a tile that holds FP8 rows need not fit the shared memory with wider ones.
    """
    fitting = [entry for entry in entries if entry.activation_bytes == activation_bytes]
    if not fitting:
        return None
    return min(fitting, key=lambda e: (abs(math.log(e.tokens / max(tokens, 1))), e.tokens)).config


@functools.lru_cache(maxsize=4096)
def _from_files(folders: tuple[Path, ...], gpu: str, name: str, tokens: int, activation_bytes: int) -> MoeConfig | None:
    for folder in folders:
        path = folder / gpu / name
        if path.is_file():
            return nearest(read_file(path).entries, tokens, activation_bytes)
    return None


@functools.lru_cache
def _gpu_of(device: torch.device) -> str:
    return gpu_slug(torch.cuda.get_device_name(device))


def _folders() -> tuple[Path, ...]:
    return (CONFIGS,) if _user_folder is None else (_user_folder, CONFIGS)


def choose_config(tokens: int, top_k: int, w13: torch.Tensor, activation_bytes: int) -> MoeConfig:
    """The config for `tokens` tokens with w13 [E, 2I, H (INT4: H/2)] on its device and activations of so many bytes."""
    if _forced is not None:
        return _forced
    experts, double_inner, hidden = w13.shape
    if w13.is_cuda:
        hidden *= 2 if w13.dtype is torch.uint8 else 1
        name = file_name(experts, hidden, double_inner // 2, weights_name(w13.dtype, activation_bytes))
        found = _from_files(_folders(), _gpu_of(w13.device), name, tokens, activation_bytes)
        if found is not None:
            return found
    return default_config(tokens * top_k, experts, activation_bytes, w13.dtype in (torch.uint8, torch.int8))


def config_text(gpu: str) -> str:
    """One phrase for the log and the table: which files there are for the GPU of that slug, and where from."""
    found: dict[str, str] = {}
    for folder in reversed(_folders()):
        own = " by you" if folder != CONFIGS else ""
        for path in sorted((folder / gpu).glob("E=*.json")):
            measured = read_file(path).source == "measured"
            found[path.name] = f"measured{own}" if measured else "computed from its properties"
    if not found:
        return f"configs for {gpu}: none, a table for all GPUs; `qwen3next tune moe` measures them"
    counts = {text: list(found.values()).count(text) for text in sorted(found.values())}
    said = " and ".join(f"{count} {text}" for text, count in counts.items())
    hint = "; `qwen3next tune moe` measures them" if any("computed" in text for text in counts) else ""
    return f"configs for {gpu}: {said}{hint}"
