"""Each packing by words written by hand, and beside the library that writes it where there is one."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from qwen3next_plugin.demo.packing import packed_tensors
from qwen3next_plugin.errors import WeightError
from qwen3next_plugin.kernels.gemm.integer import dequantize_int4, quantize_int4, unpack_nibbles
from qwen3next_plugin.spec import IntegerFormat
from qwen3next_plugin.weights_packed import PackedPart, unpack

library = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")  # comes with both engines

AWQ = IntegerFormat("awq", 4, 16, symmetric=False)
GPTQ = IntegerFormat("gptq", 4, 16)
PACKED = IntegerFormat("pack-quantized", 4, 16)


def word(*nibbles: int) -> int:
    """An int32 with these 4-bit numbers, the first in the lowest bits."""
    value = int("".join(f"{n:x}" for n in reversed(nibbles)), 16)
    return value - (1 << 32) if value >= 1 << 31 else value


def codes(stored: IntegerFormat, rows: int, columns: int, part: Any, words: list[list[int]]) -> list[list[int]]:
    found = unpack("it", torch.tensor(words, dtype=torch.int32), PackedPart(part, stored, rows, columns))
    assert found is not None
    if part == "weight" and stored.bits == 4:
        assert found.dtype == torch.uint8 and found.shape == (rows, columns // 2)
        found = unpack_nibbles(found)
    return [[int(code) for code in row] for row in found]


def test_awq_words_hold_eight_outputs_in_its_own_order() -> None:
    # Column 0 of outputs 0 to 7 is 0 to 7; AWQ writes outputs 0 2 4 6 1 3 5 7 from the lowest bits on: 0x75316420.
    assert word(0, 2, 4, 6, 1, 3, 5, 7) == 0x75316420
    words = [[0x75316420], [0x0000000F], [-0x10000000], [0]]
    found = codes(replace(AWQ, group_size=None), 8, 4, "weight", words)
    assert [row[0] for row in found] == list(range(8))
    assert [row[1] for row in found] == [15, 0, 0, 0, 0, 0, 0, 0]
    assert [row[2] for row in found] == [0, 0, 0, 0, 0, 0, 0, 15]
    zeros = codes(replace(AWQ, group_size=None), 8, 4, "zero", [[0x75316420]])
    assert [row[0] for row in zeros] == list(range(8))


def test_gptq_words_hold_eight_inputs_of_an_output() -> None:
    words = [[word(*range(8)), word(*[15] * 8)], [word(*range(8, 16)), word(*[0] * 8)]]
    assert codes(GPTQ, 2, 16, "weight", words) == [list(range(16)), [15] * 8 + [0] * 8]
    stored = IntegerFormat("gptq_v2", 4, 16, symmetric=False)
    assert codes(stored, 8, 16, "zero", [[word(*range(8, 16))]]) == [[n] for n in range(8, 16)]
    first = replace(stored, packing="gptq")
    assert codes(first, 8, 16, "zero", [[word(*range(7, 15))]]) == [[n] for n in range(8, 16)], "one less is stored"
    eight = IntegerFormat("gptq", 8, None)
    assert codes(eight, 1, 4, "weight", [[0x00807FFF]]) == [[127, -1, 0, -128]]


def test_symmetric_zero_points_are_looked_at_and_left_out() -> None:
    for stored, middle in ((GPTQ, 0x77777777), (replace(GPTQ, packing="gptq_v2"), word(*[8] * 8))):
        part = PackedPart("zero", stored, 8, 16)
        assert unpack("it", torch.tensor([[middle]], dtype=torch.int32), part) is None
        with pytest.raises(WeightError, match=r"it has zero points other than 8"):
            unpack("it", torch.tensor([[middle - 1]], dtype=torch.int32), part)
    eight = PackedPart("zero", IntegerFormat("gptq", 8, 16), 4, 16)
    assert unpack("it", torch.tensor([[0x7F7F7F7F]], dtype=torch.int32), eight) is None


@pytest.mark.parametrize("bits", [4, 8])
def test_compressed_tensors_are_what_its_own_library_packs(bits: int) -> None:
    low, high = -(1 << (bits - 1)), 1 << (bits - 1)
    signed = torch.randint(low, high, (12, 32), dtype=torch.int8)
    stored = IntegerFormat("pack-quantized", bits, 16, symmetric=bits == 8)
    found = unpack("it", library.pack_to_int32(signed, bits), PackedPart("weight", stored, 12, 32))
    assert found is not None
    expected = signed if bits == 8 else signed + 8
    assert torch.equal(unpack_nibbles(found) if bits == 4 else found, expected.to(found.dtype))
    if bits == 4:
        zeros = torch.randint(low, high, (12, 2), dtype=torch.int8)
        packed = library.pack_to_int32(zeros, bits, packed_dim=0)
        assert packed.shape == (2, 2), "12 outputs take two words"
        found = unpack("it", packed, PackedPart("zero", stored, 12, 32))
        assert found is not None and torch.equal(found, (zeros + 8).to(torch.uint8))


def test_what_demo_checkpoints_pack_its_own_library_reads() -> None:
    weight = torch.randn(12, 32)
    written = dict(packed_tensors("m", weight, replace(PACKED, symmetric=False)))
    packed, scale, zero = quantize_int4(weight, 16, symmetric=False)
    signed = library.unpack_from_int32(written["m.weight_packed"], 4, torch.Size(written["m.weight_shape"].tolist()))
    assert torch.equal(signed, unpack_nibbles(packed).to(torch.int8) - 8)
    assert zero is not None and torch.equal(written["m.weight_scale"], scale)
    zeros = library.unpack_from_int32(written["m.weight_zero_point"], 4, torch.Size((12, 2)), packed_dim=0)
    assert torch.equal(zeros, zero.to(torch.int8) - 8)


def test_a_zero_point_of_disputed_meaning_is_refused() -> None:
    part = PackedPart("zero", replace(GPTQ, symmetric=False), 8, 16)
    with pytest.raises(WeightError, match=r"it stores a zero point as 15.*gptq_v2"):
        unpack("it", torch.tensor([[word(*range(8, 16))]], dtype=torch.int32), part)


def test_asymmetric_gptq_in_both_of_its_formats() -> None:
    weight = torch.randn(16, 32)
    for packing in ("gptq", "gptq_v2"):
        stored = IntegerFormat(packing, 4, 16, symmetric=False)
        written = dict(packed_tensors("m", weight, stored))
        parts = {
            part: unpack(part, written[f"m.{suffix}"], PackedPart(part, stored, 16, 32))  # type: ignore[arg-type]
            for part, suffix in (("weight", "qweight"), ("scale", "scales"), ("zero", "qzeros"))
        }
        packed, scale, zero = quantize_int4(weight, 16, symmetric=False)
        assert zero is not None and zero.min() > 0
        assert parts["weight"] is not None and parts["scale"] is not None
        found = dequantize_int4(parts["weight"], parts["scale"], parts["zero"])
        assert torch.equal(found, dequantize_int4(packed, scale, zero))
