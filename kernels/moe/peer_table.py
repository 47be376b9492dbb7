"""How many tokens' experts an engine's grouped product runs: data, to be edited when a GPU has said otherwise.

The first rule that fits decides; where none does, or its function is not there, this plugin's own kernels run. They
alone serve weights in other formats than FP8 blocks of 128x128.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """``peer`` takes steps of at least ``min_tokens`` tokens on GPUs of this capability, with each expert's rows padded
    to a multiple of ``alignment``, which is its tiles' height.
    """

    capability: tuple[int, int]
    peer: str
    min_tokens: int
    alignment: int
    why: str


RULES = (
    Rule(
        (9, 0),
        "deepgemm",
        7168,
        128,
        "measured on an H200 for 513 experts of the published size: 1.23 ms at 8,192 tokens (benchmarks/results/h200/"
        "moe.json) and 0.69 at 2,048, of which its copies and counts have saved 0.04 since. Our tall tiles take 1.22, "
        "0.96 at 6,144 and 0.54 at 2,048 (experts-as-adopted.json): that both cross near 7,000 is a prediction",
    ),
)

MIN_TOKENS = 256
"""From which on it runs where a user asks for it by name: with fewer, hardly any row of a tile is in use."""

MOST_ERROR = 0.1
"""A peer is not used if any token's output differs from our own by more (relative norm). A few percent are values that
lie between two codes of FP8: a peer rounds them to bfloat16 before, we do not. Wrong factors
make it larger than 1."""
