"""Integers of a launch, computed on the host.

Triton's own functions of these names can be called from kernels too and cost several microseconds a call for that; a
prefill calls them thousands of times while the GPU waits.
"""


def cdiv(n: int, d: int) -> int:
    """ceil(n / d) of integers."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()
