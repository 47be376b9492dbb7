"""Safetensors checkpoints on disk: their headers, checked before anything heavy starts, and their tensors, one by one.

Layout of a file (https://github.com/huggingface/safetensors#format): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the data the offsets count into.
"""

import json
import math
from collections.abc import Iterator
from os import PathLike
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from .errors import WeightError
from .spec import Qwen3NextSpec
from .weights_map import TensorMap, is_ignored, unknown_tensor, wrong_shape

_INDEX = "model.safetensors.index.json"
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit
_FLOATS = ("F64", "F32", "BF16", "F16", "F8_E4M3")
_BYTES = {"F64": 8, "F32": 4, "BF16": 2, "F16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1}


class TensorInfo(NamedTuple):
    """One header entry: ``dtype`` as safetensors writes it (BF16, F8_E4M3, ...), ``shape``, and the file it is in."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


class CheckpointSummary(NamedTuple):
    """What a checked checkpoint holds; ``num_bytes`` is the size of its files."""

    num_files: int
    num_tensors: int
    num_bytes: int
    has_mtp: bool


def open_checkpoint(path: str | PathLike[str]) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor on the CPU) for every tensor of a checkpoint directory, read one at a time, in the files' order.

    All headers are checked first. Raises WeightError for a missing, truncated or damaged file.
    """
    read_headers(path)
    for file in checkpoint_files(path):
        try:
            with safe_open(str(file), framework="pt", device="cpu") as tensors:
                for name in tensors.keys():  # noqa: SIM118 - not a dict
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise _damaged(file, str(error)) from None


def has_mtp(path: str | PathLike[str]) -> bool:
    """Whether the checkpoint holds an MTP layer; only headers are read. Published configs do not say so."""
    return any(name.startswith("mtp.") for name in read_headers(path))


def check_checkpoint(path: str | PathLike[str], spec: Qwen3NextSpec) -> CheckpointSummary:
    """Compare a checkpoint's headers with the model a config describes; no weight is read.

    Raises WeightError for the first missing or truncated file, unknown, missing or misshapen tensor, quantised
    tensor without its scales, or dtype that does not belong there.
    """
    infos = {name: info for name, info in read_headers(path).items() if not is_ignored(name, spec)}
    tensor_map = TensorMap(spec)
    int8 = {name for name, info in infos.items() if info.dtype == "I8"}
    for name, info in infos.items():
        source = tensor_map.locate(name, int8=name in int8)
        if source is None:
            raise unknown_tensor(name, spec)
        if info.shape != source.shape:
            raise wrong_shape(name, info.shape, source)
        if (source.packed is None or source.packed.part == "scale") and info.dtype not in _FLOATS:
            raise WeightError(f"{name} holds {info.dtype}: use a checkpoint of floating-point weights, bf16 or FP8.")
    fp8 = {name for name, info in infos.items() if info.dtype == "F8_E4M3"}
    tensor_map.check_complete(infos.keys(), fp8, int8)
    files = checkpoint_files(path)
    num_bytes = sum(file.stat().st_size for file in files)
    return CheckpointSummary(len(files), len(infos), num_bytes, any(name.startswith("mtp.") for name in infos))


def checkpoint_files(path: str | PathLike[str]) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else all there are; sorted by name.

    Raises WeightError if there is none or one that the index names is not there.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise WeightError(f"{folder} is not a directory: give the directory that holds config.json and *.safetensors.")
    if not (folder / _INDEX).is_file():
        files = sorted(folder.glob("*.safetensors"))
        if not files:
            raise WeightError(
                f"{folder} holds no *.safetensors file: fetch the checkpoint again, or give another directory."
            )
        return files
    files = [folder / name for name in sorted(set(_read_index(folder / _INDEX).values()))]
    for file in files:
        if not file.is_file():
            raise WeightError(f"{file} is missing, though {_INDEX} names it: fetch the checkpoint again.")
    return files


def _read_index(file: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(file.read_text(encoding="utf-8"))["weight_map"]
    except (OSError, ValueError, KeyError, TypeError):
        weight_map = None
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightError(f"{file} is not a safetensors index with a weight_map: fetch the checkpoint again.")
    return weight_map


def read_headers(path: str | PathLike[str]) -> dict[str, TensorInfo]:
    """Name to `TensorInfo` for every tensor of a checkpoint directory; reads a few KiB of each file.

    Raises WeightError for a missing, truncated or damaged file, for a tensor in two files, or for one that the index
    promises and no file has.
    """
    infos: dict[str, TensorInfo] = {}
    for file in checkpoint_files(path):
        for name, info in read_header(file).items():
            if name in infos:
                raise WeightError(
                    f"{name} is in both {infos[name].file.name} and {file}: remove the file that is too many."
                )
            infos[name] = info
    index = Path(path) / _INDEX
    if index.is_file():
        for name, file_name in _read_index(index).items():
            if name not in infos:
                raise WeightError(
                    f"{index.parent / file_name} lacks {name}, though {_INDEX} names it: fetch the file again."
                )
    return infos


def read_header(file: Path) -> dict[str, TensorInfo]:
    """Name to `TensorInfo` for one file. Raises WeightError if it is unreadable, damaged, or shorter than it says."""
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length) if length <= min(size, _MAX_HEADER_BYTES) else b""
    except OSError as error:
        raise WeightError(f"{file} cannot be read ({error.strerror}): check the path and its permissions.") from None
    if size < 8 + length or not raw:
        raise _damaged(file, f"its {size} bytes do not hold the header it announces")
    try:
        entries = json.loads(raw)
        infos = {name: _entry(entry, file) for name, entry in entries.items() if name != "__metadata__"}
        ends = [int(entry["data_offsets"][1]) for name, entry in entries.items() if name != "__metadata__"]
    except (ValueError, KeyError, TypeError, AttributeError, IndexError):
        raise _damaged(file, "its header is not that of a safetensors file") from None
    expected = 8 + length + max(ends, default=0)
    if size != expected:
        raise _damaged(file, f"it has {size} bytes where its header makes it {expected}")
    return infos


def _entry(entry: dict[str, Any], file: Path) -> TensorInfo:
    info = TensorInfo(entry["dtype"], tuple(int(n) for n in entry["shape"]), file)
    start, end = entry["data_offsets"]
    if info.dtype in _BYTES and end - start != math.prod(info.shape) * _BYTES[info.dtype]:
        raise ValueError("offsets do not fit the shape")
    return info


def _damaged(file: Path, why: str) -> WeightError:
    return WeightError(f"{file} is truncated or damaged, {why}: fetch the file again.")
