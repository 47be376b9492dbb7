"""Config files for the engines' own kernels, under their names and in their fields.

Both engines' kernels keep gate and up side by side as 2 * inner columns, so a tile of ours with n columns of each is
2 * n of theirs. vLLM has one tile for both products; SGLang a second file, `_down`, for the second product. What ours
were measured with is not the engines' kernel, so a file that an engine ships is never replaced or hidden:

- vLLM looks in VLLM_TUNED_CONFIG_FOLDER first, file by file: names that it ships are left out.
- SGLang looks in SGLANG_MOE_CONFIG_DIR/configs/triton_X_Y_Z *instead of* its own folder, first for the running Triton,
  then from the newest version down: all that it ships is copied along, and names that it has for any version left out.
"""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from qwen3next_plugin.errors import SettingsError, UnsupportedEngineError
from qwen3next_plugin.kernels.gpus import KNOWN, gpu_slug
from qwen3next_plugin.kernels.moe.config import MoeConfig, nearest, read_file

from .files import write_atomically
from .problem import TOKENS, Problem
from .space import by_model

_SHIPPED = {
    "vllm": Path("model_executor/layers/fused_moe/configs"),
    "sglang": Path("srt/layers/moe/moe_runner/triton_utils/configs"),
}
_WIDEST = 256  # columns of a tile of theirs


@dataclass(frozen=True)
class Exported:
    """What was written, which names the engine ships itself, and how to point the engine at the rest."""

    written: tuple[Path, ...]
    shipped: tuple[str, ...]
    variable: str


def shipped_folder(engine: str) -> Path:
    """The installed engine's own config folder. Raises UnsupportedEngineError where it cannot be found."""
    if engine not in _SHIPPED:
        raise SettingsError(f"{engine!r} is not known: use {' or '.join(_SHIPPED)}.")
    spec = find_spec(engine)
    for place in (spec and spec.submodule_search_locations) or ():
        if (folder := Path(place) / _SHIPPED[engine]).is_dir():
            return folder
    raise UnsupportedEngineError(
        f"{engine}'s own config files cannot be found here, and none of them may be hidden: run this in the "
        f"environment that has {engine}."
    )


def vllm_name(experts: int, inner: int, device: str, mode: str, block: int) -> str:
    """As vLLM 0.32's `get_config_file_name` has it: one name for all of the H200 family, no space in block_shape."""
    device = re.sub(r"[\s/]+", "_", device)
    device = "NVIDIA_H200" if "H200" in device.split("_") else device
    quantised = f",dtype=fp8_w8a8,block_shape=[{block},{block}]" if mode == "fp8" else ""
    return f"E={experts},N={inner},device_name={device}{quantised}.json"


def sglang_name(experts: int, inner: int, device: str, mode: str, block: int, down: bool) -> str:
    """As SGLang 0.5.20's `get_config_file_name` has it: with a space in block_shape."""
    quantised = f",dtype=fp8_w8a8,block_shape=[{block}, {block}]" if mode == "fp8" else ""
    suffix = "_down" if down else ""
    return f"E={experts},N={inner},device_name={device.replace(' ', '_')}{quantised}{suffix}.json"


def engine_config(config: MoeConfig, block: int | None, down: bool) -> dict[str, int]:
    """One of our tiles in the engines' fields; ``block``: columns that an FP8 factor covers, None without."""
    tile = config.down if down else config.gate_up
    depth = tile.block_k if block is None else min(block, 128)
    return {
        "BLOCK_SIZE_M": config.block_m,
        "BLOCK_SIZE_N": tile.block_n if down else min(2 * tile.block_n, _WIDEST),
        "BLOCK_SIZE_K": depth,
        "GROUP_SIZE_M": 1 if config.block_m == 16 else 16,  # few rows an expert: nothing to share
        "num_warps": tile.num_warps,
        "num_stages": max(2, min(tile.num_stages, tile.num_stages * tile.block_k // depth)),
    }


def _content(path: Path, problem: Problem, device: str, down: bool) -> dict[str, Any]:
    """A file's tiles; for fewer and for more tokens than it has tiles for, since our own kernels run without any there,
    those of the estimate, where the GPU is known.
    """
    block = min(128, problem.inner & -problem.inner) if problem.mode == "fp8" else None
    entries, gpu = read_file(path).entries, KNOWN.get(gpu_slug(device))
    found: dict[int, MoeConfig | None] = {}
    for tokens in {entry.tokens for entry in entries}:
        found[tokens] = nearest(entries, tokens, min(e.activation_bytes for e in entries if e.tokens == tokens))
    if gpu is not None:
        missing = [tokens for tokens in TOKENS if not min(found) <= tokens <= max(found)]
        found |= {tokens: by_model(gpu, problem, tokens) for tokens in missing}
    return {str(n): engine_config(config, block, down) for n, config in sorted(found.items()) if config is not None}


def export(engine: str, target: Path, problem: Problem, device: str, folders: tuple[Path, ...]) -> Exported:
    """Write `engine`'s files for one problem on the GPU of this name below `target`.

    ``folders``: where our own files are looked for, the first that has one winning. Raises PluginError, one sentence,
    if there is none, if the engine is not installed here, or if `target` cannot be written.
    """
    shipped = shipped_folder(engine)
    ours = [folder / gpu_slug(device) / problem.file_name for folder in folders]
    source = next((path for path in ours if path.is_file()), None)
    if source is None:
        raise SettingsError(
            f"There is no config for {device} and {problem.file_name}: `qwen3next tune moe` on that GPU measures one."
        )
    block = min(128, problem.inner & -problem.inner)
    find = _for_vllm if engine == "vllm" else _for_sglang
    groups, folder, variable = find(problem, device, block, target)
    if engine == "sglang":
        _copy_shipped(shipped, target / "configs")
    have = {path.name for path in shipped.rglob("*.json")}
    notes = _Notes(target)
    # a `_down` of ours beside a file of theirs would not share its block_m: a group stays together
    left_out = [group[0] for group in groups if group[0] in have]
    for group in groups:
        for path in (folder / name for name in group):
            if group[0] in have:
                notes.remove(path)  # of ours, from before the engine shipped its own
            else:
                down = path.name.endswith("_down.json")
                notes.write(path, json.dumps(_content(source, problem, device, down), indent=1), source)
    notes.save()
    written = [folder / name for group in groups if group[0] not in have for name in group]
    return Exported(tuple(written), tuple(left_out), variable)


class _Notes:
    """Where our files in a folder come from, for which the engines' files have no room; others are left alone."""

    def __init__(self, target: Path) -> None:
        self.target, self.path = target, target / "qwen3next.json"
        self.known: dict[str, Any] = json.loads(self.path.read_text("utf-8")) if self.path.is_file() else {}

    def write(self, path: Path, text: str, source: Path) -> None:
        name = str(path.relative_to(self.target))
        if path.exists() and name not in self.known:
            raise SettingsError(f"{path} is there and not from here: give another folder, or take it away.")
        self.known[name] = {
            "from": f"{source.parent.name}/{source.name}",
            "source": read_file(source).source,
            "note": "tiles of qwen3next-plugin's own kernel in this engine's fields; not measured on this engine's",
        }
        write_atomically(path, text)

    def remove(self, path: Path) -> None:
        if self.known.pop(str(path.relative_to(self.target)), None) is not None:
            path.unlink(missing_ok=True)

    def save(self) -> None:
        write_atomically(self.path, json.dumps(self.known, indent=1) + "\n")


def _for_vllm(problem: Problem, device: str, block: int, target: Path) -> tuple[list[list[str]], Path, str]:
    name = vllm_name(problem.experts, problem.inner, device, problem.mode, block)
    return [[name]], target, f"VLLM_TUNED_CONFIG_FOLDER={target.absolute()}"


def _for_sglang(problem: Problem, device: str, block: int, target: Path) -> tuple[list[list[str]], Path, str]:
    """With the shared expert among the routed ones (its default) and without."""
    counts = (problem.experts, problem.experts + 1)
    names = [
        [sglang_name(count, problem.inner, device, problem.mode, block, down) for down in (False, True)]
        for count in counts
    ]
    # only plain numbers: SGLang reads every folder's version as such
    version = re.match(r"\d+(\.\d+)*", metadata.version("triton"))
    folder = target / "configs" / f"triton_{(version[0] if version else '0').replace('.', '_')}"
    return names, folder, f"SGLANG_MOE_CONFIG_DIR={target.absolute()}"


def _copy_shipped(shipped: Path, target: Path) -> None:
    try:
        shutil.copytree(shipped, target, dirs_exist_ok=True)
    except (OSError, shutil.Error) as error:
        raise SettingsError(f"{target} cannot be written ({error}): give another folder.") from None
