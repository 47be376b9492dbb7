"""What a tuning leaves behind: the config file, a before/after table and lines for a log."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from qwen3next_plugin.activation import DISTRIBUTION, plugin_version
from qwen3next_plugin.kernels.gpus import Gpu
from qwen3next_plugin.kernels.moe.config import FORMAT, MoeConfig, Tile, config_object
from qwen3next_plugin.kernels.moe.tall_rule import CAPABILITY, MIN_TOKENS

from .problem import SCALE_BLOCK, TOKENS, Problem
from .search import Winner
from .space import by_model
from .texts import cells_of, line_of, table_for


def _head(source: str, note: str, gpu: Gpu, problem: Problem) -> dict[str, Any]:
    # of the problem what the file's name does not say
    return {
        "format": FORMAT,
        "source": source,
        "note": note,
        "gpu": {"name": gpu.name, "sms": gpu.sms, "figures": gpu.source},
        "experts_of_all_ranks": problem.total_experts,
        "top_k": problem.top_k,
    }


def measured_file(
    gpu: Gpu, problem: Problem, versions: dict[str, str], effort: str, winners: Sequence[Winner]
) -> dict[str, Any]:
    """The content of a measured config file; the kernels read `tokens`, `activation_bytes` and `config`."""
    note = f"measured by {DISTRIBUTION} {plugin_version()}, effort {effort}{_not_met(gpu, problem, winners)}"
    return _head("measured", note, gpu, problem) | {
        "versions": versions,
        "entries": [
            {
                "tokens": winner.tokens,
                "activation_bytes": problem.activation_bytes(winner.tokens, gpu),
                "config": config_object(winner.config),
                "us": round(1e6 * winner.seconds, 2),
                "before_us": round(1e6 * winner.before_seconds, 2) if winner.before_seconds < float("inf") else None,
                "before": config_object(winner.before),
                "relative_error": float(f"{winner.error:.2e}"),
                "machines": winner.machines,
            }
            for winner in winners
        ],
    }


def _not_met(gpu: Gpu, problem: Problem, winners: Sequence[Winner]) -> str:
    """A clause on entries whose own numbers of tokens run in other tiles than any file's, if there are some."""
    whole_blocks = problem.hidden % SCALE_BLOCK == 0 and problem.inner % SCALE_BLOCK == 0
    tall = problem.mode == "fp8" and gpu.capability == CAPABILITY and whole_blocks
    if not tall or all(winner.tokens < MIN_TOKENS for winner in winners):
        return ""
    return (
        f"; steps of {MIN_TOKENS} tokens and more run in tiles of their own, of no file: their entries are for those "
        "of fewer tokens that they are nearest to"
    )


def model_file(gpu: Gpu, problem: Problem, ranks: str) -> dict[str, Any]:
    """The content of a file computed from the GPU's properties; ``ranks``: the flags that ask for the problem."""
    note = (
        "computed from the GPU's properties by an estimate, not measured; to measure your own: "
        f"qwen3next tune moe {ranks} --dtype {problem.mode}"
    )
    found = [(tokens, by_model(gpu, problem, tokens)) for tokens in TOKENS]
    return _head("model", note, gpu, problem) | {
        "entries": [
            {
                "tokens": tokens,
                "activation_bytes": problem.activation_bytes(tokens, gpu),
                "config": config_object(config),
            }
            for tokens, config in found
            if config is not None
        ],
    }


def tile_text(tile: Tile) -> str:
    """``64x128 w4 s3``: columns, depth, warps, stages."""
    return f"{tile.block_n}x{tile.block_k} w{tile.num_warps} s{tile.num_stages}"


def config_text(config: MoeConfig) -> str:
    """Rows and both tiles."""
    return f"{config.block_m} rows, {tile_text(config.gate_up)}, {tile_text(config.down)}"


def as_line(winner: Winner) -> str:
    """One line for a log."""
    return line_of(f"{winner.tokens} tokens", winner, config_text(winner.config))


def as_table(winners: Sequence[Winner]) -> Table:
    """For a terminal: one row a number of tokens."""
    table = table_for("tokens", ["rows, gate-up tile, down tile"], winners)
    for winner in winners:
        table.add_row(str(winner.tokens), *cells_of(winner), config_text(winner.config))
    return table
