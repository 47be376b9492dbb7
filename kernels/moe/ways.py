"""Which way so many tokens go through the experts: decided here once, for a step and for what is compiled before it."""

from dataclasses import dataclass, replace

import torch

from ..dispatch import Choice
from ..early import EARLY_CAPABILITY, can_begin_early
from ..gemm.policy import FP8_CAPABILITY, INTEGERS, fp8_choices, has_fp8_units
from ..gemm.reference import FP8, GROUP, has_row_factors
from ..gpus import Target
from .config import MoeConfig, choose_config, config_text, is_forced
from .peers import Plan, peer_choices, plan_for
from .tall_rule import TILES, runs_tall, tall_choices

MAX_TOKENS = 16
"""Up to which whole rows are read pair by pair: 5, 8, 12 and 16 tokens took an H200 42, 63, 92 and 117 us in FP8, where
tiles apart took 54, 84, 103 and 127."""
EARLY_TOKENS = 8
"""Up to which the second launch of whole rows begins early: an H200 saved 2 us by it with 5 and 8 tokens, and lost 1.5
and 3 with 12 and 16."""
MANY_PAIRS = 4096  # from which on chunks sort them: as quick at 5,632 on an H200, twice as quick at 11,264
SHORT_SCAN, LONG_SCAN = 256, 1024  # ids that a program of the sort looks at at a time
MOST_APART = 192  # pairs up to which an H200 was quicker without sorting them: 176 by 3 to 4 %, 253 slower by 2


@dataclass(frozen=True)
class Way:
    """Whether activations are rounded, the tiles (None: whole rows, nothing is sorted, or a plan), how pairs are
    sorted: `scan_of` them, whether they are `chunked`, or `apart`; the plan by which an engine's products run; and
    whether launches begin `early`, while those before them still run: the second one of whole rows, all from the first
    product on with tiles.
    """

    quantize: bool
    config: MoeConfig | None
    scan: int
    chunks: bool
    plan: Plan | None = None
    tall: bool = False  # our own products, as `tall_rule` says
    apart: bool = False
    early: bool = False


def suits_few(w13: torch.Tensor, w13_scale: torch.Tensor | None, quantize_activations: bool) -> bool:
    """Whether weights of this format can be read by whole rows: as they are, or FP8 in blocks."""
    return not quantize_activations and (w13_scale is None or in_blocks(w13, w13_scale))


def in_blocks(w13: torch.Tensor, w13_scale: torch.Tensor | None) -> bool:
    """Whether these are FP8 weights with a factor a block."""
    return w13_scale is not None and w13.dtype is FP8 and not has_row_factors(w13, w13_scale)


def scan_of(num_pairs: int) -> int:
    """Ids that an expert's program looks at at a time. Two sizes: each is compiled for every height of a tile."""
    return SHORT_SCAN if num_pairs <= SHORT_SCAN else LONG_SCAN


def chunked(num_pairs: int) -> bool:
    """Whether so many pairs are counted in chunks rather than by each expert's own scan of them."""
    return num_pairs >= MANY_PAIRS


def max_tiles(num_pairs: int, num_experts: int, block_m: int) -> int:
    """The most tiles any routing can need: each expert with a pair wastes less than one tile."""
    return min(num_pairs, num_pairs // block_m + min(num_experts, num_pairs))


def apart(num_pairs: int, num_experts: int, block_m: int) -> bool:
    """Whether each pair has a tile that it may begin, and all are looked at in one scan: then nothing is sorted."""
    return num_pairs <= MOST_APART and max_tiles(num_pairs, num_experts, block_m) == num_pairs


def rounds(tokens: int, w13: torch.Tensor, w13_scale: torch.Tensor | None) -> bool:
    """Whether activations are rounded to FP8 that nobody decided on; then their pairs share tiles.

    A tile of 16 rows meets an expert's weights then, however few of them are in use; widening those weights for it
    costs an H200 more than rounding does. Up to MAX_TOKENS vector products take the least time (benchmarks/NOTES.md),
    and activations that are kept are more exact: outputs are off by 0.0023 of their norm, by 0.042 with rounded ones.
    """
    return tokens > MAX_TOKENS and in_blocks(w13, w13_scale) and has_fp8_units(w13.device)


def way_choices(target: Target) -> list[Choice]:
    """For the table of what runs: the ways below, on that GPU."""
    tiles = config_text(target.slug)
    rounded = fp8_choices(target)[-1]  # or, without FP8 units, widened
    early = f"; the second begins early up to {EARLY_TOKENS} tokens" if target.capability >= EARLY_CAPABILITY else ""
    order = f"sorted by expert, but for up to {MOST_APART} pairs among enough experts"
    beyond = f"from {MAX_TOKENS + 1} tokens"
    walked = Choice(
        f"{beyond}, FP8 blocks, down of a share's rows of up to {GROUP} columns, in tiles of 16 pairs",
        why="rounded where they are multiplied; a program goes through a quarter of the columns",
        tiles="its own, of no file",
    )
    return [
        Choice(
            f"up to {MAX_TOKENS} tokens, bf16 and FP8 blocks",
            why=f"whole rows in two launches, nothing is sorted, activations kept{early}",
        ),
        Choice(f"{beyond}, bf16", why=order, tiles=tiles),
        replace(rounded, shapes=f"{beyond}, FP8 blocks", why=f"{order}; {rounded.why}", tiles=tiles),
        *([walked] if target.capability >= FP8_CAPABILITY else []),
        replace(INTEGERS, shapes=f"any tokens, {INTEGERS.shapes}", why=f"{order}; {INTEGERS.why}", tiles=tiles),
        *peer_choices(target),
        *tall_choices(target),
    ]


def choose_way(
    tokens: int,
    choices: int,
    element_size: int,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None,
    quantize_activations: bool | None,
    num_shared: int,
) -> Way:
    """The way of `tokens` tokens of `element_size` bytes a value with `choices` experts each; the rest as `fused_moe`.

    None for quantize_activations decides it by `rounds`.
    """
    experts, pairs = w13.shape[0], tokens * choices
    quantize = quantize_activations
    if quantize is None:
        quantize = rounds(tokens, w13, w13_scale)
    plan = plan_for(tokens, choices, w13, w13_scale) if quantize and not is_forced() else None
    if plan is not None:
        return Way(quantize, None, 0, True, plan)
    if quantize and not is_forced() and runs_tall(tokens, w13, w13_scale):
        return Way(quantize, TILES, 0, True, tall=True)
    if tokens <= MAX_TOKENS and not is_forced() and suits_few(w13, w13_scale, quantize):
        return Way(quantize, None, 0, False, early=tokens <= EARLY_TOKENS and can_begin_early(w13.device))
    routed = w13[: experts - num_shared] if num_shared else w13
    config = choose_config(tokens, choices - num_shared, routed, 1 if quantize else element_size)
    if chunked(pairs):
        return Way(quantize, config, 0, True)
    alone = apart(pairs, experts, config.block_m)
    return Way(quantize, config, scan_of(pairs), False, apart=alone, early=can_begin_early(w13.device))


def ways_up_to(
    max_tokens: int,
    choices: int,
    element_size: int,
    w13: torch.Tensor,
    w13_scale: torch.Tensor | None = None,
    quantize_activations: bool | None = None,
    num_shared: int = 0,
) -> dict[Way, tuple[int, int]]:
    """Every way that 1 to max_tokens tokens can go, with the first and the last number of tokens that goes it.

    Every number is asked about: what tiles a file names may come and go and come again as tokens grow.
    """
    found: dict[Way, tuple[int, int]] = {}
    for tokens in range(1, max_tokens + 1):
        way = choose_way(tokens, choices, element_size, w13, w13_scale, quantize_activations, num_shared)
        found[way] = (found.get(way, (tokens,))[0], tokens)
    return found
