"""All tiles that could be tried, and the few of them that are: those the estimates do not rule out."""

import itertools
import math
from dataclasses import astuple, dataclass
from functools import lru_cache

from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile

from .model import product_seconds
from .problem import Problem, Product

BLOCK_M = (16, 32, 64, 128)
BLOCK_N = (32, 64, 128, 256)
BLOCK_K = (32, 64, 128, 256)
NUM_WARPS = (4, 8)
NUM_STAGES = (2, 3, 4, 5, 6)
_SAYS_NOTHING = math.log(1.08)


@dataclass(frozen=True)
class Effort:
    """How much is tried for a number of tokens.

    ``slack``: estimates up to so many times the best one stay in; ``tiles`` and ``blocks``: of those at most so many
    tiles of each product, for so many sizes of block_m.
    """

    slack: float
    tiles: int
    blocks: int


EFFORTS = {"quick": Effort(1.3, 3, 1), "default": Effort(2.0, 6, 2), "thorough": Effort(4.0, 40, 4)}


@dataclass(frozen=True)
class Candidates:
    """For one block_m: tiles of each product, the most promising first."""

    block_m: int
    gate_up: tuple[Tile, ...]
    down: tuple[Tile, ...]

    @property
    def count(self) -> int:
        """Configs that `search` measures: each gate-up tile, then each other down tile beside the best of them."""
        return len(self.gate_up) + len(self.down) - 1


def _power_of_two(n: int) -> int:
    return 1 << (max(n, 1) - 1).bit_length()


def tiles_of(product: Product) -> list[Tile]:
    """Every tile that is not wider or deeper than the product."""
    columns = [n for n in BLOCK_N if n <= max(_power_of_two(product.columns), BLOCK_N[0])]
    depths = [k for k in BLOCK_K if k <= max(_power_of_two(product.depth), BLOCK_K[0])]
    return [Tile(*sizes) for sizes in itertools.product(columns, depths, NUM_WARPS, NUM_STAGES)]


def ranked(gpu: Gpu, problem: Problem, product: Product, tokens: int, block_m: int) -> list[tuple[float, Tile]]:
    """Every tile that fits, with its estimated seconds, the shortest first.

    Within 8 % the estimates say nothing: there come first 128 columns, 128 bytes of depth, three stages and four warps,
    around which the tiles lie that were measured best for 512 experts (vLLM's and SGLang's files for six GPUs).
    """
    found = [(product_seconds(gpu, problem, product, tokens, block_m, tile), tile) for tile in tiles_of(product)]
    found = [(seconds, tile) for seconds, tile in found if seconds < math.inf]
    if not found:
        return []
    shortest = _shortest(found)

    def order(pair: tuple[float, Tile]) -> tuple[float, ...]:
        seconds, tile = pair
        usual = abs(math.log2(tile.block_n * product.matrices / 128))
        usual += abs(math.log2(tile.block_k * product.weight_bytes / 128)) + abs(tile.num_stages - 3) / 2
        return (math.log(seconds / shortest) // _SAYS_NOTHING, usual + (tile.num_warps != 4), seconds, *astuple(tile))

    return sorted(found, key=order)


def _shortest(found: list[tuple[float, Tile]]) -> float:
    return min(seconds for seconds, _ in found)


@lru_cache(maxsize=256)
def candidates(gpu: Gpu, problem: Problem, tokens: int, effort: Effort) -> tuple[Candidates, ...]:
    """What is worth measuring for `tokens` tokens; empty where nothing fits."""
    products = problem.products(problem.activation_bytes(tokens, gpu))
    by_block: list[tuple[float, Candidates]] = []
    for block_m in BLOCK_M:
        lists = [ranked(gpu, problem, product, tokens, block_m) for product in products]
        if not all(lists):
            continue
        kept = [
            tuple(tile for seconds, tile in found if seconds <= effort.slack * _shortest(found))[: effort.tiles]
            for found in lists
        ]
        by_block.append((sum(map(_shortest, lists)), Candidates(block_m, *kept)))
    by_block.sort(key=lambda pair: (pair[0], pair[1].block_m))
    kept_blocks = [found for seconds, found in by_block if seconds <= effort.slack * by_block[0][0]]
    return tuple(kept_blocks[: effort.blocks])


def by_model(gpu: Gpu, problem: Problem, tokens: int) -> MoeConfig | None:
    """The config with the shortest estimate; None where nothing fits."""
    found = candidates(gpu, problem, tokens, Effort(1.1, 1, 1))
    return MoeConfig(found[0].block_m, found[0].gate_up[0], found[0].down[0]) if found else None
