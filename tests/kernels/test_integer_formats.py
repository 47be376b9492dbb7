"""INT4 and INT8 weights as formulas: nibbles, groups, zeros, and how near they come to what was rounded."""

import pytest
import torch

from qwen3next_plugin.kernels.gemm import integer

GROUPS = (16, 32, 64, 128)
SCALES = (torch.float32, torch.float16, torch.bfloat16)


def test_even_columns_lie_in_the_low_nibble() -> None:
    packed = integer.pack_nibbles(torch.tensor([[1, 2, 15, 0], [0, 15, 7, 8]]))
    assert packed.dtype is torch.uint8 and packed.tolist() == [[0x21, 0x0F], [0xF0, 0x87]]
    assert integer.unpack_nibbles(packed).tolist() == [[1, 2, 15, 0], [0, 15, 7, 8]]
    every = torch.arange(256, dtype=torch.uint8).view(2, 4, 32)
    assert torch.equal(integer.pack_nibbles(integer.unpack_nibbles(every)), every)
    with pytest.raises(ValueError, match=r"codes is \[2, 3\]; .* K must be even"):
        integer.pack_nibbles(torch.zeros(2, 3))


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [*GROUPS, 256])
def test_int4_comes_within_half_a_step(group: int, symmetric: bool, dtype: torch.dtype) -> None:
    weight = (torch.randn(3, 5, 256) + 0.3).to(dtype)
    packed, scale, zero = integer.quantize_int4(weight, group, symmetric)
    assert packed.dtype is torch.uint8 and list(packed.shape) == [3, 5, 128]
    assert scale.dtype is dtype and list(scale.shape) == [3, 5, 256 // group]
    assert (zero is None) is symmetric
    if zero is not None:
        assert zero.dtype is torch.uint8 and zero.shape == scale.shape and int(zero.max()) <= 15
    back = integer.dequantize_int4(packed, scale, zero, torch.float64)
    steps = scale.double().repeat_interleave(group, dim=-1)
    # a zero that was rounded moves the ends by half a step; a scale that was rounded, by a little more
    assert bool(((back - weight.double()).abs() <= steps * (0.55 if symmetric else 1.1)).all())


@pytest.mark.parametrize("dtype", SCALES)
@pytest.mark.parametrize("group", [*GROUPS, 256])
def test_int8_comes_within_half_a_step(group: int, dtype: torch.dtype) -> None:
    weight = torch.randn(3, 5, 256).to(dtype)
    codes, scale = integer.quantize_int8(weight, group)
    assert codes.dtype is torch.int8 and scale.dtype is dtype and list(scale.shape) == [3, 5, 256 // group]
    back = integer.dequantize_int8(codes, scale, torch.float64)
    steps = scale.double().repeat_interleave(group, dim=-1)
    assert bool(((back - weight.double()).abs() <= steps).all())


def test_zeros_and_what_codes_hold_are_exact() -> None:
    for symmetric in (True, False):
        packed, scale, zero = integer.quantize_int4(torch.zeros(2, 32), 16, symmetric)
        assert not integer.dequantize_int4(packed, scale, zero).any()
    codes, scale = integer.quantize_int8(torch.zeros(2, 32), 32)
    assert not codes.any() and bool(torch.isfinite(scale).all())
    codes, scale = integer.quantize_int8_tokens(torch.zeros(2, 32))
    assert not codes.any() and scale.tolist() == [[1.0], [1.0]]
    whole = torch.arange(-7, 9).clamp(max=7).repeat(2, 1).float()
    assert torch.equal(integer.dequantize_int4(*integer.quantize_int4(whole, 16)), whole)
    shifted = torch.arange(-4, 12).repeat(2, 1).float()
    packed, scale, zero = integer.quantize_int4(shifted, 16, symmetric=False)
    assert zero is not None and zero.tolist() == [[4], [4]]
    assert torch.equal(integer.dequantize_int4(packed, scale, zero), shifted)


def test_tokens_are_rounded_by_their_largest_value_halves_to_even() -> None:
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -0.5, -126.5], [254.0, 1.0, 3.0, -5.0, -254.0, 0.0]])
    codes, scale = integer.quantize_int8_tokens(x.to(torch.bfloat16))
    assert scale.dtype is torch.float32 and scale.tolist() == [[1.0], [2.0]]
    assert codes.tolist() == [[127, 0, 2, 2, 0, -126], [127, 0, 2, -2, -127, 0]]


def test_groups_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match=r"quantize_int4: group is 48 for a weight \[2, 64\]; it must divide 64"):
        integer.quantize_int4(torch.ones(2, 64), 48)
    with pytest.raises(ValueError, match=r"quantize_int8: group is 0 for a weight \[2, 64\]"):
        integer.quantize_int8(torch.ones(2, 64), 0)
