"""INT4 and INT8 weights with a scale a row and group of columns, as formulas in plain torch.

value = (code - zero) * scale. INT4: codes 0..15, two a byte, the low nibble being the even column; a zero a group, or 8
for all (symmetric). INT8: codes -128..127, symmetric. A group is `group` neighbouring columns of one row; all of a row
is "per channel". Activations rounded to INT8 carry one scale a token. Round-to-nearest as in Jacob et al. 2018, section
2.1; groups as in Frantar et al., GPTQ, 2023, section 4.
"""

import torch

SCALES = (torch.float32, torch.float16, torch.bfloat16)
SYMMETRIC_ZERO = 8
MIN_GROUP = 16


def pack_nibbles(codes: torch.Tensor) -> torch.Tensor:
    """codes [..., K] of any integer type, 0..15 -> uint8 [..., K/2]: column 2j in the low nibble of byte j, 2j+1 above.

    Raises ValueError for an odd K.
    """
    if codes.shape[-1] % 2:
        raise ValueError(f"pack_nibbles: codes is {list(codes.shape)}; two columns share a byte, so K must be even")
    codes = codes.to(torch.uint8)
    return codes[..., 0::2] | (codes[..., 1::2] << 4)


def unpack_nibbles(packed: torch.Tensor) -> torch.Tensor:
    """uint8 [..., K/2] -> uint8 codes [..., K], 0..15: what `pack_nibbles` packed."""
    return torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)


def _grouped(weight: torch.Tensor, group: int, name: str) -> torch.Tensor:
    """weight as float32 (or wider) [..., K/group, group]."""
    columns = weight.shape[-1]
    if group < 1 or columns % group:
        raise ValueError(f"{name}: group is {group} for a weight {list(weight.shape)}; it must divide {columns}")
    return weight.to(torch.promote_types(weight.dtype, torch.float32)).unflatten(-1, (-1, group))


def _scales(span: torch.Tensor, steps: int, weight: torch.Tensor) -> torch.Tensor:
    """span / steps as a checkpoint holds it: in the weight's own type. Nothing but zeros is exact under any scale."""
    dtype = weight.dtype if weight.dtype in SCALES else torch.float32
    scale = (span / steps).to(dtype)
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def quantize_int4(
    weight: torch.Tensor, group: int, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """weight [..., N, K] -> (packed uint8 [..., N, K/2], scale [..., N, K/group], zero uint8 like scale, or None).

    The scale has weight's type (float64: float32) and is rounded to it before the codes are. symmetric: a group's
    largest magnitude becomes 7 steps from 8, zero is None; else its smallest and largest value (0 included) become 0
    and 15. Raises ValueError unless group divides K and K is even.
    """
    w = _grouped(weight, group, "quantize_int4")
    if symmetric:
        scale = _scales(w.abs().amax(dim=-1), 7, weight)
        offset = torch.full_like(scale, SYMMETRIC_ZERO, dtype=w.dtype)
    else:
        low, high = w.amin(dim=-1).clamp(max=0), w.amax(dim=-1).clamp(min=0)
        scale = _scales(high - low, 15, weight)
        offset = (-low / scale.to(w.dtype)).round().clamp(0, 15)
    steps = (w / scale.to(w.dtype)[..., None]).round()
    codes = (steps + offset[..., None]).clamp(0, 15).flatten(-2)
    return pack_nibbles(codes), scale, None if symmetric else offset.to(torch.uint8)


def dequantize_int4(
    packed: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor | None = None, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """(code - zero) * scale [..., N, K] as `dtype`; packed [..., N, K/2], scale and zero [..., N, groups]."""
    compute = torch.promote_types(dtype, torch.float32)
    codes = unpack_nibbles(packed).to(compute)
    repeats = codes.shape[-1] // scale.shape[-1]
    offset = SYMMETRIC_ZERO if zero is None else zero.to(compute).repeat_interleave(repeats, dim=-1)
    return ((codes - offset) * scale.to(compute).repeat_interleave(repeats, dim=-1)).to(dtype)


def quantize_int8(weight: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """weight [..., N, K] -> (int8 [..., N, K], scale [..., N, K/group] of weight's type; float64: float32).

    A group's largest magnitude becomes 127. Raises ValueError unless group divides K.
    """
    w = _grouped(weight, group, "quantize_int8")
    scale = _scales(w.abs().amax(dim=-1), 127, weight)
    codes = (w / scale.to(w.dtype)[..., None]).round().clamp(-128, 127)
    return codes.flatten(-2).to(torch.int8), scale


def dequantize_int8(codes: torch.Tensor, scale: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """code * scale [..., K] as `dtype`; codes int8 [..., K], scale [..., groups]."""
    compute = torch.promote_types(dtype, torch.float32)
    repeats = codes.shape[-1] // scale.shape[-1]
    return (codes.to(compute) * scale.to(compute).repeat_interleave(repeats, dim=-1)).to(dtype)


def quantize_int8_tokens(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Activations x [..., K] -> (int8 [..., K], scale float32 [..., 1]): a row's largest magnitude becomes 127.

    Halves are rounded to even. `dequantize_int8` gives the values back.
    """
    values = x.to(torch.float32)
    peak = values.abs().amax(dim=-1, keepdim=True)
    scale = torch.where(peak > 0, peak / 127, 1.0)
    return (values / scale).round().clamp(-127, 127).to(torch.int8), scale
