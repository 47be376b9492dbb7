"""A table of Gated DeltaNet's kernels that chooses often."""

import dataclasses

import torch

from qwen3next_plugin.kernels.gdn import config
from qwen3next_plugin.kernels.gdn.config_file import STATE_BYTES, checked
from qwen3next_plugin.kernels.gdn.table import (
    PROJECTED,
    STEPS,
    DecodeRule,
    DecodeTile,
    GdnTable,
    OwnPrefill,
    PrefillRule,
    PrefillWay,
    StatesRule,
    StatesTile,
    VerifyRule,
    VerifyTile,
)


def varied_table() -> GdnTable:
    """By which numbers of tokens and rows choose among more variants and tiles than by any shipped table."""
    table = config.table_of(torch.device("cpu"))
    ways = [
        (OwnPrefill("blocks", 8, 168), 1000, 0),
        (OwnPrefill("merging", 4, 168, 3), 500, 0),
        (OwnPrefill("blocks", walk_stages=3), 100, 64),
        (OwnPrefill(walk_stages=1), 50, 0),
    ]
    prefill = [PrefillRule(PrefillWay("own", own), tokens, mean, "a test") for own, tokens, mean in ways]
    decode = [
        DecodeRule(size, programs, DecodeTile(elements, warps, stages), "a test")
        for size in STATE_BYTES
        for programs, elements, warps, stages in (
            (0, None, 4, 1),
            (20, 1024, 2, 1),
            (40, 1024, 2, 3),
            (100, 2048, 4, 1),
            (3000, 512, 1, 5),
        )
    ]
    verify = [
        VerifyRule(size, tokens, programs, VerifyTile(rows, warps, form), "a test")
        for size in STATE_BYTES
        for tokens, programs, rows, warps, form in (
            (2, 0, 64, 2, STEPS),
            (4, 0, 32, 4, STEPS),
            (4, 50, 16, 2, PROJECTED),
            (4, 1000, 8, 1, STEPS),
        )  # fmt: skip
    ]
    states = [
        StatesRule(size, tokens, programs, StatesTile(rows, warps), "a test")
        for size in STATE_BYTES
        for tokens, programs, rows, warps in ((2, 0, 8, 1), (4, 8, 16, 2), (4, 12, 32, 4))
    ]
    prefill += table.prefill
    varied = dataclasses.replace(table, prefill=tuple(prefill), decode=tuple(decode), verify=tuple(verify))
    return checked(dataclasses.replace(varied, states=tuple(states)))
