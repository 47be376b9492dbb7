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
        "a prediction, not measured: what others publish for an H200 is below our kernels' times at every shape "
        "compared; with fewer than 64 tokens a row, copying states would cost more than the products save",
    ),
    Rule(
        (9, 0),
        "fla",
        2048,
        64,
        "a prediction, not measured: likewise; below some 2,000 tokens its many launches a layer should take the host "
        "longer than ours take the GPU",
    ),
)

MOST_CHECKPOINT_BYTES = 512 * 1024 * 1024
"""Snapshots are cut out of states kept on a grid by the peer: above this much for them, our own kernels run."""

MOST_ERROR = 3e-2
"""A peer whose outputs or states differ from our own by more (relative norm, bfloat16 tokens) is not used."""
