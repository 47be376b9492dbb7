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
    Scope,
    TensorMap,
    in_scope,
    is_ignored,
    unknown_tensor,
    wrong_shape,
)
from .weights_packed import SCALE_SUFFIX as INTEGER_SCALE_SUFFIX
from .weights_packed import ZERO_SUFFIX, dequantize, unpack
from .weights_shards import check_tensor_parallel, shard_fused
from .weights_sources import Placement, Source

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
    every other tensor keeps its dtype. Of a weight in packed integers, codes, scales and zero points come one by one in
    the layout of `weights_packed`, the latter under the weight's name and ``_scale`` or ``_zero``; head and routers
    come in ``spec.dtype`` in any case. Raises WeightError for an unknown, repeated, misshapen or missing tensor.
    """
    for source, tensor in _stream(tensors, spec, scope, complete):
        yield source.placement.name, tensor, source.placement


def _stream(
    tensors: Iterable[tuple[str, torch.Tensor]], spec: Qwen3NextSpec, scope: Scope, complete: bool
) -> Iterator[tuple[Source, torch.Tensor]]:
    tensor_map, widened = TensorMap(spec), Widened(spec)
    seen: set[str] = set()
    fp8: set[str] = set()
    int8: set[str] = set()
    for name, tensor in tensors:
        if not in_scope(name, scope) or is_ignored(name, spec):
            continue
        source = tensor_map.locate(name, int8=tensor.dtype == torch.int8)
        if source is None:
            raise unknown_tensor(name, spec)
        if name in seen:
            raise WeightError(f"{name} is in the checkpoint twice: remove the file that does not belong to it.")
        seen.add(name)
        if tensor.dtype in (_FP8, torch.int8):
            (fp8 if tensor.dtype == _FP8 else int8).add(name)
        laid = _relaid(name, tensor, source, spec)
        if laid is not None:
            yield from widened.add(source, laid) if widened.covers(source) else ((source, laid),)
    if complete:
        tensor_map.check_complete(seen, fp8, int8, scope)


class Widened:
    """Modules that engines run unquantised: their codes, scales and zero points wait for one another here."""

    NAMES = ("lm_head.weight", "mlp.gate.weight", "mlp.shared_expert_gate.weight")

    def __init__(self, spec: Qwen3NextSpec) -> None:
        self.spec = spec
        self._waiting: dict[str, dict[str, torch.Tensor]] = {}

    def covers(self, source: Source) -> bool:
        """Whether ``source`` is a packed part of such a module."""
        name = source.placement.name.removesuffix(INTEGER_SCALE_SUFFIX).removesuffix(ZERO_SUFFIX)
        return source.packed is not None and name.endswith(self.NAMES)

    def add(self, source: Source, tensor: torch.Tensor) -> Iterator[tuple[Source, torch.Tensor]]:
        """The whole weight in the model's dtype once its last part is here."""
        assert source.packed is not None
        name = source.placement.name.removesuffix(INTEGER_SCALE_SUFFIX).removesuffix(ZERO_SUFFIX)
        parts = self._waiting.setdefault(name, {})
        parts[source.packed.part] = tensor
        if parts.keys() >= ({"weight", "scale"} if source.packed.stored.symmetric else {"weight", "scale", "zero"}):
            weight = dequantize(parts["weight"], parts["scale"], parts.get("zero"), self.spec.dtype)
            yield Source(source.placement._replace(name=name), tuple(weight.shape), tuple(weight.shape)), weight


def _relaid(name: str, tensor: torch.Tensor, source: Source, spec: Qwen3NextSpec) -> torch.Tensor | None:
    """The tensor in the fused layout; None for one that is only checked."""
    if tuple(tensor.shape) != source.shape:
        raise wrong_shape(name, tuple(tensor.shape), source)
    if source.packed is not None:
        unpacked = unpack(name, tensor, source.packed)
        return None if unpacked is None else _rows_in_order(unpacked, source, spec)
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
        case "conv":
            return tensor.squeeze(1)
        case "float32":
            return tensor.float()
    return _rows_in_order(tensor, source, spec)


def _rows_in_order(tensor: torch.Tensor, source: Source, spec: Qwen3NextSpec) -> torch.Tensor:
    match source.relayout:
        case "qkvz":
            return deinterleave_qkvz(tensor, spec.gdn)
        case "ba":
            return deinterleave_ba(tensor, spec.gdn)
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
        target.narrow(-2, source.offset, tensor.shape[-2]).copy_(tensor)
    return fused
