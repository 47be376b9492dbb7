"""Argument checks that several operations share: shapes in the message, no look at any value on the device."""

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
INTS = (torch.int32, torch.int64)


def check(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has this shape, one of these dtypes, and the device of ``like``."""
    if tuple(tensor.shape) != shape:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {shape} is needed")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {' or '.join(str(dtype) for dtype in dtypes)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} is on {tensor.device} but the tokens are on {like.device}; put both on one device")


def check_dims(name: str, tensor: Tensor, layout: str, dims: int) -> None:
    """Raise ValueError unless ``tensor`` has ``dims`` dimensions; ``layout`` says which, for the message."""
    if tensor.dim() != dims:
        raise ValueError(f"{name} has shape {tuple(tensor.shape)}; {layout} is needed")


def check_rows(
    query_start: Tensor, query_end: Tensor, like: Tensor, **vectors: tuple[Tensor, tuple[torch.dtype, ...]]
) -> int:
    """Check the per-row vectors of an operation and return the number of rows N.

    ``vectors`` are further ``[N]`` tensors by name, each with its dtypes. Slots may be strided (a column of a block
    table); everything else is contiguous. Raises ValueError naming the vector and the shapes.
    """
    check_dims("query_start", query_start, "[rows]", 1)
    rows = query_start.shape[0]
    every = {"query_start": (query_start, INTS), "query_end": (query_end, INTS), **vectors}
    for name, (vector, dtypes) in every.items():
        check(name, vector, (rows,), dtypes, like)
        if not name.endswith("slots"):
            _check_contiguous(name, vector)
    return rows


def check_optional(rows: int, like: Tensor, **vectors: Tensor | None) -> None:
    """Check what an operation may be given besides: integer ``[N]`` vectors by name, contiguous, all of them or none.

    Raises ValueError naming the vector and the shapes.
    """
    missing = [name for name, vector in vectors.items() if vector is None]
    if missing and len(missing) < len(vectors):
        raise ValueError(f"{missing[0]} is None, but {', '.join(vectors)} come together: give all of them or none")
    for name, vector in vectors.items():
        if vector is not None:
            check(name, vector, (rows,), INTS, like)
            _check_contiguous(name, vector)


def _check_contiguous(name: str, vector: Tensor) -> None:
    if vector.shape[0] > 1 and vector.stride(0) != 1:
        raise ValueError(
            f"{name} has stride {vector.stride(0)}; a contiguous vector of {vector.shape[0]} rows is needed"
        )
