"""How many tokens' experts an engine's grouped product runs: data, to be edited when a GPU has said otherwise.

The first rule that fits decides; where none does, or its function is not there, this plugin's own kernels run. They
alone serve weights in other formats than FP8 blocks of 128x128.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """``peer`` takes steps of at least ``min_tokens`` tokens on GPUs of this capability, with each expert's rows padded
    to a multiple of ``alignment``, which is its tiles' height, where an expert has at least ``min_inner`` columns.
    """

    capability: tuple[int, int]
    peer: str
    min_tokens: int
    alignment: int
    why: str
    min_inner: int = 0


RULES = (
    Rule(
        (9, 0),
        "deepgemm",
        7168,
        128,
        "measured on an H200 beside our tall tiles (benchmarks/results/h200/moe-beside-sglang.json): 1.20 against "
        "1.24 ms for 513 experts of 512 columns at 8,192 tokens, 0.66 against 0.54 at 2,048, so that both cross near "
        "7,000 is a prediction; 0.83 against 0.81 and 0.63 against 0.59 at 8,192 with 256 and 128 columns",
        min_inner=512,
    ),
)

MIN_TOKENS = 256
"""From which on it runs where a user asks for it by name: with fewer, hardly any row of a tile is in use."""

MOST_ERROR = 0.1
"""A peer is not used if any token's output differs from our own by more (relative norm). A few percent are values that
lie between two codes of FP8: a peer rounds them to bfloat16 before, we do not. Wrong factors
make it larger than 1."""
