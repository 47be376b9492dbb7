"""Packed integer weights as checkpoints store them, to the layout that the kernels take.

The kernels' layout: ``weight`` uint8 [N, K/2] (4 bits, two columns a byte, the even one low) or int8 [N, K], ``scale``
[N, K/G], ``zero`` uint8 [N, K/G] where the format has zero points; value = (code - zero) * scale, zero 8 where there is
none. Rows N are the layer's outputs, as in every other weight, so that re-laying and slicing rows is the same for all.

Stored: AutoAWQ (gemm) packs 8 outputs into an int32, in the order 0 2 4 6 1 3 5 7, lowest bits first, and keeps
columns as rows. GPTQ packs inputs in order, and zero points (of outputs) in order and, in its first format, one less
than they are. compressed-tensors packs inputs in order, zero points by outputs.
"""

from collections.abc import Iterable
from typing import Literal, NamedTuple

import torch

from .errors import WeightError
from .kernels.gemm.integer import dequantize_int4, dequantize_int8, unpack_nibbles
from .spec import IntegerFormat

Part = Literal["weight", "scale", "zero", "order", "shape"]
ZERO_SUFFIX, SCALE_SUFFIX = "_zero", "_scale"

_GPTQ: dict[str, Part] = {".qweight": "weight", ".qzeros": "zero", ".scales": "scale", ".g_idx": "order"}
_COMPRESSED: dict[str, Part] = {
    ".weight_packed": "weight",
    ".weight_scale": "scale",
    ".weight_zero_point": "zero",
    ".weight_shape": "shape",
    ".weight_g_idx": "order",
}
_PARTS: dict[str, dict[str, Part]] = {
    "awq": {suffix: part for suffix, part in _GPTQ.items() if part != "order"},
    "gptq": _GPTQ,
    "gptq_v2": _GPTQ,
    "pack-quantized": _COMPRESSED,
    # The codes are `.weight` itself, in int8.
    "int-quantized": {".weight_scale": "scale"},
}
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # the output in each nibble of an int32, from the lowest bits on


class PackedPart(NamedTuple):
    """One tensor of a quantised module: which part it is, how the module is stored, and its rows and columns."""

    part: Part
    stored: IntegerFormat
    rows: int
    columns: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of this part in a checkpoint."""
        bits, groups = self.stored.bits, self.columns // (self.stored.group_size or self.columns)
        rows, columns = -(-self.rows * bits // 32), -(-self.columns * bits // 32)
        if self.part == "order":
            return (self.columns,)
        if self.part == "shape":
            return (2,)
        match self.stored.packing:
            case "awq":
                return {"weight": (self.columns, rows), "zero": (groups, rows)}.get(self.part, (groups, self.rows))
            case "gptq" | "gptq_v2":
                return {"weight": (columns, self.rows), "zero": (groups, rows)}.get(self.part, (groups, self.rows))
            case "pack-quantized":
                return {"weight": (self.rows, columns), "zero": (rows, groups)}.get(self.part, (self.rows, groups))
        return (self.rows, groups if self.part == "scale" else self.columns)

    def laid_out(self, rows: int) -> tuple[int, ...]:
        """The shape of this part of a module of so many rows in the kernels' layout."""
        if self.part == "weight":
            return (rows, self.columns // 2 if self.stored.bits == 4 else self.columns)
        return (rows, self.columns // (self.stored.group_size or self.columns))


def split(name: str, known: Iterable[str] = _PARTS) -> tuple[str, Part] | None:
    """The module and the part that a checkpoint name of one of these packings means; None for any other name."""
    for packing in known:
        for suffix, part in _PARTS[packing].items():
            if name.endswith(suffix):
                return name.removesuffix(suffix), part
    return None


def companions(module: str, stored: IntegerFormat, codes: str) -> Iterable[str]:
    """The tensors that have to be in the checkpoint beside ``codes``, the module's own tensor of codes."""
    for suffix, part in _PARTS[stored.packing].items():
        needed = part == "scale" or (part == "zero" and not stored.symmetric)
        if needed and module + suffix != codes:
            yield module + suffix


def unpack(name: str, tensor: torch.Tensor, part: PackedPart) -> torch.Tensor | None:
    """A checkpoint tensor in the kernels' layout; None for one that only had to be looked at.

    Raises WeightError, naming it, for a dtype or values that the format does not have.
    """
    integers = part.part != "scale"
    if integers == tensor.dtype.is_floating_point:
        raise WeightError(f"{name} holds {tensor.dtype}: {'integers' if integers else 'factors'} are stored there.")
    match part.part:
        case "order":
            _check_order(name, tensor, part)
            return None
        case "shape":
            if tensor.tolist() != [part.rows, part.columns]:
                found = f"says {tensor.tolist()} where config.json makes it {[part.rows, part.columns]}"
                raise WeightError(f"{name} {found}: take the config.json that belongs to this checkpoint.")
            return None
        case "scale":
            return tensor if part.stored.packing.endswith("quantized") else tensor.t().contiguous()
        case "zero":
            return _zeros(name, tensor, part)
    return _codes(name, tensor, part)


def _codes(name: str, tensor: torch.Tensor, part: PackedPart) -> torch.Tensor:
    if part.stored.packing == "int-quantized":
        return tensor
    _check_words(name, tensor)
    if part.stored.packing == "awq":
        pairs = _awq_codes(tensor).view(torch.int16)  # `pack_nibbles`, in a quarter of its time: there are 73,728
        return (pairs | (pairs >> 4)).to(torch.uint8)
    if part.stored.packing != "pack-quantized":
        tensor = tensor.t().contiguous()
    # An int32 has its first column in its lowest bits, so that its bytes in memory are in the columns' order.
    columns = part.columns * part.stored.bits // 8
    codes = tensor.contiguous().view(torch.uint8)[:, :columns]
    return codes if part.stored.bits == 4 else (codes ^ 0x80).view(torch.int8)


def _zeros(name: str, tensor: torch.Tensor, part: PackedPart) -> torch.Tensor | None:
    """uint8 [N, groups]; None for a symmetric format, all of whose zero points are the middle code."""
    _check_words(name, tensor)
    stored = part.stored
    if stored.packing == "awq":
        zeros = _awq_codes(tensor)
    else:
        words = tensor.t() if stored.packing == "pack-quantized" else tensor
        codes = words.contiguous().view(torch.uint8)
        zeros = (unpack_nibbles(codes) if stored.bits == 4 else codes)[:, : part.rows].t()
    if stored.packing == "gptq":
        if stored.bits == 4 and not stored.symmetric and bool((zeros == 15).any()):
            raise WeightError(
                f"{name} stores a zero point as 15, which some readers of GPTQ's first format take for 0 and others "
                'for 16: write the checkpoint with checkpoint_format "gptq_v2".'
            )
        zeros = zeros + 1
    if not stored.symmetric:
        return zeros.contiguous()
    middle = 1 << (stored.bits - 1)
    if bool((zeros != middle).any()):
        raise WeightError(
            f"{name} has zero points other than {middle}, though quantization_config says symmetric: take the "
            "config.json that belongs to this checkpoint."
        )
    return None


def _check_words(name: str, tensor: torch.Tensor) -> None:
    if tensor.dtype != torch.int32:
        raise WeightError(f"{name} holds {tensor.dtype}: codes are packed into int32 there.")


def _awq_codes(words: torch.Tensor) -> torch.Tensor:
    """int32 [R, N/8] -> uint8 [N, R]: each output's numbers in a row."""
    words = words.t().contiguous()
    codes = torch.empty(words.shape[0], 8, words.shape[1], dtype=torch.uint8, device=words.device)
    for place, output in enumerate(_AWQ_ORDER):
        codes[:, output] = (words >> (4 * place)) & 15
    return codes.flatten(0, 1)


def _check_order(name: str, order: torch.Tensor, part: PackedPart) -> None:
    """Raise WeightError unless group g is the g-th run of columns, as if there were no such tensor."""
    group = part.stored.group_size or part.columns
    expected = torch.arange(part.columns, device=order.device) // group
    if not torch.equal(order.to(expected.dtype), expected):
        raise WeightError(
            f"{name} puts columns into groups by activation order (desc_act), which is not served: use a checkpoint "
            "quantised with desc_act false."
        )


def dequantize(codes: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The values [..., N, K] that codes, scales and zero points in the kernels' layout stand for."""
    if codes.dtype == torch.uint8:
        return dequantize_int4(codes, scale, zero, dtype)
    return dequantize_int8(codes, scale, dtype)
