"""The way back: from fused weights, as the oracle trains them, to the published names and layout."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from qwen3next_plugin.config import Qwen3NextSpec
from qwen3next_plugin.weights_layout import ba_rows, qkvz_rows
from qwen3next_plugin.weights_map import TensorMap
from qwen3next_plugin.weights_sources import Source

from .random import tensor_shapes


def checkpoint_tensors(fused: Mapping[str, Tensor], spec: Qwen3NextSpec) -> Iterator[tuple[str, Tensor]]:
    """The inverse of ``weights.fuse_checkpoint`` for unquantised weights.

    Yields every tensor of the checkpoint by its published name in ``spec.dtype`` (A_log and dt_bias in float32),
    experts one by one and the rows of ``in_proj_qkvz`` and ``in_proj_ba`` interleaved by key head. KeyError for a
    missing weight.
    """
    tensor_map = TensorMap(spec)
    for name, shape in tensor_shapes(spec):
        source = tensor_map.locate(name)
        assert source is not None  # both tables list the same tensors; a test compares them
        tensor = _part(fused[source.placement.name].detach().cpu(), source, spec).reshape(shape)
        wide = source.relayout == "float32"
        yield name, tensor.to(torch.float32 if wide else spec.dtype).contiguous().clone()


def _part(fused: Tensor, source: Source, spec: Qwen3NextSpec) -> Tensor:
    if not source.whole:
        whole = fused if source.placement.expert is None else fused[source.placement.expert]
        return whole.narrow(-2, source.offset, source.shape[-2])
    if source.relayout in ("qkvz", "ba"):
        rows = qkvz_rows(spec.gdn) if source.relayout == "qkvz" else ba_rows(spec.gdn)
        interleaved = torch.empty_like(fused)
        interleaved[rows] = fused
        return interleaved
    return fused
