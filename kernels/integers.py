"""Integers of a launch and of a step, computed on the host.

Triton's own functions of these names can be called from kernels too and cost several microseconds a call for that; a
prefill calls them thousands of times while the GPU waits.
"""


def cdiv(n: int, d: int) -> int:
    """ceil(n / d) of integers."""
    return -(-n // d)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n below 1."""
    return 1 << max(0, n - 1).bit_length()


def padded_tokens(tokens: int) -> int:
    """The next number whose last bits are 0, all but three: four between a power of two and the next.

    What is compiled or captured for a number of tokens is met by few of them then, before a server is ready.
    """
    step = 1 << max(0, tokens.bit_length() - 3)
    return -(-tokens // step) * step
