"""Checkpoint tensors to the fused tensors that kernels and engines use, one at a time or a whole model at once.

Names and layouts are in `weights_map` and `weights_layout`, tensor-parallel slices in `weights_shards`, files in
`checkpoint`; what other rooms need of them is re-exported here.
"""

from collections.abc import Iterable, Iterator

import torch

from .checkpoint import CheckpointSummary, check_checkpoint, has_mtp, open_checkpoint
from .errors import WeightError
from .spec import Qwen3NextSpec
from .weights_layout import (
    ba_rows,
    deinterleave_ba,
    deinterleave_ba_scales,
    deinterleave_qkvz,
    deinterleave_qkvz_scales,
    qkvz_rows,
    take_block_scales,
)
from .weights_map import (
    SCALE_SUFFIX,
    Placement,
    Scope,
    Source,
    TensorMap,
    in_scope,
    is_ignored,
    missing_tensor,
    unknown_tensor,
    wrong_shape,
)
from .weights_shards import check_tensor_parallel, shard_fused

__all__ = [
    "SCALE_SUFFIX",
    "CheckpointSummary",
    "Placement",
    "check_checkpoint",
    "check_tensor_parallel",
    "deinterleave_ba",
    "deinterleave_ba_scales",
    "deinterleave_qkvz",
    "deinterleave_qkvz_scales",
    "fuse_checkpoint",
    "fused_stream",
    "has_mtp",
    "open_checkpoint",
    "shard_fused",
]

_FP8 = torch.float8_e4m3fn


def fused_stream(
    tensors: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec, *, scope: Scope = "all", complete: bool = True
) -> Iterator[tuple[str, torch.Tensor, Placement]]:
    """For each checkpoint tensor its fused name, the tensor in the fused layout, and where in the fused tensor it goes.

    Holds one tensor at a time. ``scope`` "model" passes over ``mtp.*``; "mtp" yields the drafter's own tensors,
    embedding and head. With ``complete``, the end of ``tensors`` is an error while something is missing (turn it off
    where an engine hands over only some of the experts). Block scales come out in float32, as do A_log and dt_bias;
    every other tensor keeps its dtype. Raises WeightError for an unknown, repeated, misshapen or missing tensor.
    """
    for source, tensor in _stream(tensors, spec, scope, complete):
        yield source.placement.name, tensor, source.placement


def _stream(
    tensors: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec, scope: Scope, complete: bool
) -> Iterator[tuple[Source, torch.Tensor]]:
    tensor_map = TensorMap(spec)
    seen: set[str] = set()
    quantised: set[str] = set()
    for name, tensor in tensors:
        if not in_scope(name, scope) or is_ignored(name, spec):
            continue
        source = tensor_map.locate(name)
        if source is None:
            raise unknown_tensor(name, spec)
        if name in seen:
            raise WeightError(f"{name} is in the checkpoint twice: remove the file that does not belong to it.")
        seen.add(name)
        if tensor.dtype == _FP8:
            quantised.add(name)
        yield source, _relaid(name, tensor, source, spec)
    if not complete:
        return
    missing = tensor_map.first_missing(seen, scope)
    if missing is None:
        missing = next((w + SCALE_SUFFIX for w in sorted(quantised) if w + SCALE_SUFFIX not in seen), None)
    if missing is not None:
        raise missing_tensor(missing)


def _relaid(name: str, tensor: torch.Tensor, source: Source, spec: Qwen3NextSpec) -> torch.Tensor:
    if tuple(tensor.shape) != source.shape:
        raise wrong_shape(name, tuple(tensor.shape), source)
    if not tensor.dtype.is_floating_point:
        raise WeightError(f"{name} holds {tensor.dtype}: use a checkpoint of floating-point weights, bf16 or FP8.")
    if name.endswith(SCALE_SUFFIX):
        if source.relayout in ("qkvz", "ba"):
            assert spec.quant is not None and spec.quant.weight_block_size is not None  # locate has seen to it
            rows = qkvz_rows(spec.gdn) if source.relayout == "qkvz" else ba_rows(spec.gdn)
            weight = name.removesuffix(SCALE_SUFFIX)
            tensor = take_block_scales(tensor, rows, spec.quant.weight_block_size[0], weight)
        return tensor.float()
    match source.relayout:
        case "qkvz":
            return deinterleave_qkvz(tensor, spec.gdn)
        case "ba":
            return deinterleave_ba(tensor, spec.gdn)
        case "conv":
            return tensor.squeeze(1)
        case "float32":
            return tensor.float()
    return tensor


def fuse_checkpoint(tensors: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec) -> dict[str, torch.Tensor]:
    """All fused tensors of a model by name, ``mtp.*`` included where the checkpoint has it.

    ``tensors`` are (checkpoint name, tensor) pairs in any order, for example from `open_checkpoint`. Raises WeightError
    for the first unknown, repeated, misshapen or missing tensor, or for parts of one tensor that differ in dtype.
    """
    fused: dict[str, torch.Tensor] = {}
    for source, tensor in _stream(tensors, spec, "all", complete=True):
        name = source.placement.name
        if source.whole:
            fused[name] = tensor
            continue
        whole = fused.get(name)
        if whole is None:
            whole = fused[name] = torch.empty(source.fused_shape, dtype=tensor.dtype, device=tensor.device)
        if whole.dtype != tensor.dtype:
            raise WeightError(
                f"{name} would be made of {whole.dtype} and {tensor.dtype} parts: quantise all parts of it or none."
            )
        target = whole if source.placement.expert is None else whole[source.placement.expert]
        target.narrow(-2, source.offset, source.shape[-2]).copy_(tensor)
    return fused
