"""Which prefill runs for which shape: data, to be edited when a GPU has said otherwise.

The first rule that fits decides; where none does, or its function is not there, this plugin's own kernels run. They
alone serve rows that are out of order or have gaps, empty rows, float32 and float16 tokens, and heads other than 128.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Rule:
    """``peer`` takes prefills of at least ``min_tokens`` tokens, ``min_mean`` a row, on GPUs of this capability."""

    capability: tuple[int, int]
    peer: str
    min_tokens: int
    min_mean: int
    why: str


RULES = (
    Rule(
        (9, 0),
        "flashinfer",
        512,
        64,
        "not measured by us: public H200 figures are 2 to 5 times below our kernels' on an H100; under 64 tokens a row "
        "its copies of the states cost more than its products save",
    ),
    Rule(
        (9, 0),
        "fla",
        2048,
        64,
        "not measured by us: public H200 figures are 1.3 to 1.5 times below our kernels' on an H100; its eight or more "
        "launches a layer take the host longer than ours take the GPU below some 2,000 tokens",
    ),
)

MOST_CHECKPOINT_BYTES = 512 * 1024 * 1024
"""Snapshots are cut out of states kept on a grid by the peer: above this much for them, our own kernels run."""

MOST_ERROR = 3e-2
"""A peer whose outputs or states differ from our own by more (relative norm, bfloat16 tokens) is not used."""
