"""Rotary position embedding tables: plain rotary and YaRN, in float64 until the last rounding.

Angles reach position * 1 radian, so float32 angles at position 262144 are wrong by up to 0.015 radian; float64 ones
are not, and cost nothing since the table is built once.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import TYPE_CHECKING

from .spec import RopeSpec

if TYPE_CHECKING:  # settings need `attention_factor`, and the command line must not wait for torch
    import torch

_ROWS_AT_A_TIME = 65536


def inverse_frequencies(rope: RopeSpec, rotary_dim: int) -> torch.Tensor:
    """Radians a token for each pair of rotary columns: float64 [rotary_dim / 2] on the CPU.

    Plain: ``theta ** (-2i / rotary_dim)`` (Su et al. 2021, section 3.2.2). YaRN (Peng et al. 2023, section 3.2,
    "NTK-by-parts"): pairs that turn more than ``beta_fast`` times within the original context keep their frequency,
    those that turn less than ``beta_slow`` times are slowed by ``factor``, and a linear ramp joins the two.
    Raises ValueError for another ``rope_type``, or for YaRN without its factor and original context.
    """
    import torch

    pairs = torch.arange(0, rotary_dim, 2, dtype=torch.float64, device="cpu")
    plain = rope.theta ** (-pairs / rotary_dim)
    if rope.rope_type == "default":
        return plain
    if rope.rope_type != "yarn" or rope.factor is None or rope.original_max_position_embeddings is None:
        raise ValueError(f"rope_type must be default, or yarn with factor and original_max_position_embeddings: {rope}")
    low = _pair_turning(rope.beta_fast or 32.0, rope, rotary_dim)
    high = _pair_turning(rope.beta_slow or 1.0, rope, rotary_dim)
    if rope.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary_dim - 1)
    # A ramp of no width would divide by zero; transformers widens it by the same amount.
    width = high - low if high != low else 0.001
    slowed = ((torch.arange(rotary_dim // 2, dtype=torch.float64, device="cpu") - low) / width).clamp(0, 1)
    return plain * (1 - slowed) + plain / rope.factor * slowed


def _pair_turning(turns: float, rope: RopeSpec, rotary_dim: int) -> float:
    """The (fractional) pair that turns so many times within the original context; the inverse of plain rotary."""
    wavelength = (rope.original_max_position_embeddings or 1) / (turns * 2 * math.pi)
    return rotary_dim * math.log(wavelength) / (2 * math.log(rope.theta))


def attention_factor(rope: RopeSpec) -> float:
    """What cos and sin are multiplied by: 1 for plain rotary; for YaRN as given, else 0.1 ln(factor) + 1 (eq. 22)."""
    if rope.rope_type == "default":
        return 1.0
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 0.1 * math.log(rope.factor or 1.0) + 1.0


def build_cos_sin(
    rope: RopeSpec, rotary_dim: int, num_positions: int, device: torch.device | str | None = None
) -> torch.Tensor:
    """cos and sin of positions 0 to ``num_positions`` - 1, times `attention_factor`.

    Returns float32 [num_positions, rotary_dim] on ``device``: the first half of a row is cos of each pair's angle,
    the second half sin.
    """
    import torch

    frequencies = inverse_frequencies(rope, rotary_dim).to(device or "cpu")
    scale = attention_factor(rope)
    half = rotary_dim // 2
    table = torch.empty(num_positions, rotary_dim, dtype=torch.float32, device=frequencies.device)
    for start in range(0, num_positions, _ROWS_AT_A_TIME):
        stop = min(start + _ROWS_AT_A_TIME, num_positions)
        positions = torch.arange(start, stop, dtype=torch.float64, device=frequencies.device)
        angles = positions[:, None] * frequencies
        table[start:stop, :half] = angles.cos() * scale
        table[start:stop, half:] = angles.sin() * scale
    return table


@lru_cache(maxsize=2)
def shared_cos_sin(rope: RopeSpec, rotary_dim: int, num_positions: int, device: str) -> torch.Tensor:
    """`build_cos_sin` once a process: the model's layers and its drafter's look into one table."""
    return build_cos_sin(rope, rotary_dim, num_positions, device)
