"""What is tuned: one rank's experts, and what so many tokens bring to them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from qwen3next_plugin.errors import SettingsError
from qwen3next_plugin.expert_shard import ExpertShard
from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.kernels.moe.config import file_name, weights_name
from qwen3next_plugin.spec import Qwen3NextSpec

TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
TUNED = (24, *TOKENS[5:])
"""What is measured when nothing else is asked for: up to `kernels.moe.ways.MAX_TOKENS` tokens have no tiles."""
WIDE_TOKENS = 4
"""Entries of FP8 weights up to so many tokens are for wide activations, met where rounding was forbidden only."""
MODES = ("bf16", "fp8")
SCALE_BLOCK = 128


@dataclass(frozen=True)
class Product:
    """out [rows, columns] = activations [rows, depth] by `matrices` weights [columns, depth] of each row's expert.

    ``scale_depth``: columns of the weights that one factor covers (FP8), else None.
    """

    columns: int
    depth: int
    matrices: int
    weight_bytes: int
    activation_bytes: int
    scale_depth: int | None


@dataclass(frozen=True)
class Problem:
    """One rank's routed experts: `experts` of `total_experts`, each with `inner` of its intermediate columns."""

    experts: int
    total_experts: int
    top_k: int
    hidden: int
    inner: int
    mode: str

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights."""
        return torch.float8_e4m3fn if self.mode == "fp8" else torch.bfloat16

    @property
    def weight_bytes(self) -> int:
        """Of one weight."""
        return 1 if self.mode == "fp8" else 2

    @property
    def file_name(self) -> str:
        """Of the config file."""
        return file_name(self.experts, self.hidden, self.inner, weights_name(self.dtype, 2))

    def activation_bytes(self, tokens: int, gpu: Gpu) -> int:
        """Of one activation in the tiles of so many tokens."""
        return 1 if self.mode == "fp8" and gpu.fp8 is not None and tokens > WIDE_TOKENS else 2

    def products(self, activation_bytes: int) -> tuple[Product, Product]:
        """Gate-up and down."""

        def one(columns: int, depth: int, matrices: int) -> Product:
            scale = min(SCALE_BLOCK, depth & -depth) if self.mode == "fp8" else None
            return Product(columns, depth, matrices, self.weight_bytes, activation_bytes, scale)

        return one(self.inner, self.hidden, 2), one(self.hidden, self.inner, 1)

    def touched(self, tokens: int) -> float:
        """Experts of this rank that `tokens` tokens touch if every expert is as likely as any other."""
        return self.experts * (1.0 - (1.0 - self.top_k / self.total_experts) ** tokens)

    def pairs(self, tokens: int) -> float:
        """Rows that `tokens` tokens bring to this rank."""
        return tokens * self.top_k * self.experts / self.total_experts

    def tiles(self, tokens: int, block_m: int) -> float:
        """Tiles of `block_m` rows over all experts, the last one of each expert padded."""
        return self.experts * _mean_tiles(tokens, self.top_k / self.total_experts, block_m)


@cache
def _mean_tiles(tokens: int, chance: float, block_m: int) -> float:
    """The mean of ceil(count / block_m) for a binomial count."""
    mean, spread = tokens * chance, math.sqrt(tokens * chance * (1 - chance))
    first, last = max(1, math.floor(mean - 8 * spread)), min(tokens, math.ceil(mean + 8 * spread) + 8)
    total = 0.0
    for count in range(first, last + 1):
        ways = math.lgamma(tokens + 1) - math.lgamma(count + 1) - math.lgamma(tokens - count + 1)
        rest = (tokens - count) * math.log1p(-chance) if chance < 1 else (0.0 if count == tokens else -math.inf)
        total += math.exp(ways + count * math.log(chance) + rest) * math.ceil(count / block_m)
    return total


def problem_of(spec: Qwen3NextSpec, tensor_parallel: int, expert_parallel: int, mode: str) -> Problem:
    """One rank's part of a model under tensor or expert parallelism. Raises PluginError for what cannot be."""
    if tensor_parallel > 1 and expert_parallel > 1:
        raise SettingsError("--tp and --ep: experts are cut one way only: give one of the two, the other stays 1.")
    if mode not in MODES:
        raise SettingsError(f"--dtype: {mode!r} is not known: use {' or '.join(MODES)}.")
    shard = ExpertShard(spec, 0, max(tensor_parallel, expert_parallel), expert_parallel > 1)
    moe = spec.moe
    return Problem(
        shard.num_experts, moe.num_experts, moe.top_k, spec.hidden_size, shard.intermediate_size, mode
    )  # fmt: skip
