"""What a GPU does with FP8 weights: whether activations are rounded to FP8 too, and who converts the weights.

Few rows: the product waits for the weights' bytes, so rounding x saves nothing and costs accuracy; weights are widened
to x's dtype in registers (exactly) and the block factors are applied to the float32 partial sums. Many rows: the
product is bound by the tensor cores, which are twice as fast in FP8, so x is rounded by groups of 1x128 where the GPU
has them. GPUs without FP8 units (compute capability 8.0 to 8.8) have no FP8 conversion either, and Triton refuses the
type there: the kernels read such weights as bytes and widen them by bit operations, activations are never rounded.
"""

import functools

import torch

from ..dispatch import Choice
from ..gpus import Target

MIN_CAPABILITY = (8, 0)  # bf16 on tensor cores
FP8_CAPABILITY = (8, 9)
MIN_ROWS = 64  # of a product, from which FP8 arithmetic is used


@functools.lru_cache
def has_fp8_units(device: torch.device) -> bool:
    """Whether the GPU multiplies FP8 E4M3 in hardware (compute capability 8.9 and later)."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= FP8_CAPABILITY


def quantizes_activations(rows: int, device: torch.device) -> bool:
    """Whether `rows` activations meeting one FP8 weight on `device` are rounded to FP8 first."""
    return rows >= MIN_ROWS and has_fp8_units(device)


def decodes_weights(device: torch.device) -> bool:
    """Whether kernels widen FP8 weights by bit operations, for want of a conversion on `device`."""
    return device.type == "cuda" and not has_fp8_units(device)


def weight_codes(weight: torch.Tensor) -> torch.Tensor:
    """FP8 weights as kernels take them: as they are, or a view of their bytes where `decodes_weights`.

    Raises ValueError for a GPU without bf16 tensor cores, which the widened weights would have to meet.
    """
    if not decodes_weights(weight.device):
        return weight
    if weight.is_cuda:
        _require(weight.device, MIN_CAPABILITY, "FP8 weights need", "use the bf16 checkpoint on another one")
    return weight.view(torch.uint8)


def require_integer_products(device: torch.device) -> None:
    """Raise ValueError for a GPU whose tensor cores take neither bf16 nor INT8 as the kernels use them."""
    if device.type == "cuda":
        _require(device, MIN_CAPABILITY, "INT4 and INT8 weights need", "use another one")


def require_fp8_units(device: torch.device) -> None:
    """Raise ValueError for a GPU that cannot round to FP8, where Triton would fail while compiling."""
    if device.type == "cuda":
        remedy = "leave quantize_activations out there"
        _require(device, FP8_CAPABILITY, "rounding activations to FP8 needs", remedy)


def _require(device: torch.device, least: tuple[int, int], what: str, remedy: str) -> None:
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) < least:
        raise ValueError(
            f"{what} a GPU of compute capability {least[0]}.{least[1]} or later; "
            f"{torch.cuda.get_device_name(device)} has {major}.{minor}: {remedy}"
        )


def fp8_choices(target: Target) -> list[Choice]:
    """What that GPU does with activations that meet FP8 weights in blocks, by the rows that meet one."""
    if target.capability < FP8_CAPABILITY:
        return [Choice("FP8 blocks", why="no FP8 units here, widened in the kernels, activations kept")]
    return [
        Choice(f"FP8 blocks, below {MIN_ROWS} rows", why="widened in the kernels, activations kept: bound by memory"),
        Choice(f"FP8 blocks, from {MIN_ROWS} rows", why="activations rounded to FP8 by 1x128 groups"),
    ]


INTEGERS = Choice(
    "INT4 and INT8 weights",
    why="widened in the kernels, activations kept, or INT8 a token where the checkpoint says so",
)
