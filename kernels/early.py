"""Launches that begin while the one before them still runs (programmatic dependent launch), on Hopper GPUs and later.

A kernel begun early may read what no launch of a step writes, weights and the states of its layer, and must wait
(`gdc_wait`) before it touches anything else: then all that came before has ended and can be seen. After that, and not
before, it lets the next one begin (`gdc_launch_dependents`), which so finds all but this launch done.
"""

import torch

from .dispatch import interpreting
from .offers import capability_of

EARLY_CAPABILITY = (9, 0)  # the first with programmatic dependent launch
EARLY_ROWS = 2
"""Up to which a layer's launches begin early: of an H200's 45 us a layer it saved 3.5 with one row, of 57 1.5 with two;
with four it lost 2 and with eight 17, for programs that wait take the place of those that work."""


def can_begin_early(device: torch.device) -> bool:
    """Whether a launch can begin on `device` while the one before it still runs."""
    return capability_of(device) >= EARLY_CAPABILITY and torch.version.hip is None and not interpreting()


def begins_early(device: torch.device, rows: int) -> bool:
    """Whether a layer's launch for so many rows does; of experts `moe.ways` decides."""
    return rows <= EARLY_ROWS and can_begin_early(device)


def launch_options(early: bool) -> dict[str, bool]:
    """For a launch that begins early: left out otherwise, for not every Triton knows the option."""
    return {"launch_pdl": True} if early else {}
