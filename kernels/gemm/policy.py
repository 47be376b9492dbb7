"""When activations are rounded to FP8 before a product with FP8 weights.

Few rows: the product waits for the weights' bytes, so rounding x saves nothing and costs accuracy; weights are widened
to x's dtype in registers (exactly) and the block factors are applied to the float32 partial sums. Many rows: the
product is bound by the tensor cores, which are twice as fast in FP8, so x is rounded by groups of 1x128 where the GPU
has them.
"""

import functools

import torch

MIN_ROWS = 64  # rows (of one expert, in a grouped product) from which FP8 arithmetic is used


@functools.lru_cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the GPU multiplies FP8 E4M3 in hardware (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 9)


def quantizes_activations(rows: int, device: torch.device) -> bool:
    """Whether `rows` activations meeting one FP8 weight on `device` are rounded to FP8 first."""
    return rows >= MIN_ROWS and has_fp8_units(device)


def require_fp8_units(device: torch.device) -> None:
    """Raise ValueError for a GPU without FP8 conversions, where Triton would fail while compiling."""
    if device.type == "cuda" and not has_fp8_units(device):
        major, minor = torch.cuda.get_device_capability(device)
        raise ValueError(
            f"FP8 weights need a GPU of compute capability 8.9 or later; {torch.cuda.get_device_name(device)} has "
            f"{major}.{minor}: use the bf16 checkpoint there"
        )


def activation_text() -> str:
    """One phrase saying what the present GPU does, for the activation log line."""
    if torch.cuda.is_available() and has_fp8_units(torch.device("cuda", torch.cuda.current_device())):
        return f"FP8 weights: activations kept below {MIN_ROWS} rows, FP8 by 1x128 groups from there"
    return "FP8 weights: activations kept"
