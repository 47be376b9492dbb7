"""Products of few rows at the published model's sizes: microseconds, and the share of the copy bandwidth they reach.

    python benchmarks/dense_few.py benchmarks/results/h200/dense-few.json          # the table's tiles, and some others
    python benchmarks/dense_few.py --rows 1,4 --only out_proj FILE

One CUDA graph calls a product with one weight after another until four times the L2 cache has been read, for in a model
no layer's weights are in the cache when it begins. Beside it stands `torch.nn.functional.linear` with the same weights
in bfloat16, which is what engines run where weights are not quantised. Every product is checked against float64 first.
"""

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional

from qwen3next_plugin.bench.ceilings import measure_ceilings
from qwen3next_plugin.kernels.gemm import dequantize_block, quantize_block
from qwen3next_plugin.kernels.gemm.triton_few import Tile, few_matmul, tile_of

# name -> columns, rows of the weight in FP8, rows of the weight in bfloat16; both: in one launch
SHAPES = {
    "in_proj": (2048, 12288, 64),
    "out_proj": (4096, 2048, 0),
    "qkv_proj": (2048, 9216, 0),
    "o_proj behind its gate": (4096, 2048, 0),
    "router": (2048, 0, 512),
    "in_proj in bf16": (2048, 0, 12288),
}
OTHERS = (
    *(Tile(True, rows, columns, warps) for rows in (2, 4, 8) for columns, warps in ((2048, 4), (4096, 8), (2048, 8))),
    *(Tile(False, rows, 512, 4, stages) for rows in (16, 32, 64) for stages in (2, 3, 4, 5)),
    *(Tile(False, rows, 1024, 8, 2) for rows in (16, 32)),
)
Weight = tuple[torch.Tensor, torch.Tensor | None]


def weights_of(name: str) -> list[Weight]:
    columns, quantised, plain = SHAPES[name]
    made: list[Weight] = []
    if quantised:
        made.append(quantize_block(torch.randn(quantised, columns, device="cuda") / columns**0.5))
    if plain:
        made.append((torch.randn(plain, columns, device="cuda", dtype=torch.bfloat16) / columns**0.5, None))
    return made


def exact(x: torch.Tensor, gate: torch.Tensor | None, weight: Weight) -> torch.Tensor:
    values = weight[0].double() if weight[1] is None else dequantize_block(*weight, torch.float64)
    return (x.double() if gate is None else x.double() * gate.double().sigmoid()) @ values.T


def microseconds(calls: list[Callable[[], Any]]) -> float:
    """The shortest mean over a graph of these calls among five repeats."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    best = math.inf
    for _ in range(5):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        for _ in range(10):
            graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) * 100 / len(calls))
    return best


def measure(name: str, rows: int, copy_gb_s: float) -> list[dict[str, Any]]:
    """One row a tile, the table's first; a tile that the GPU cannot run says why."""
    first = weights_of(name)
    size = sum(weight.nbytes + (0 if scale is None else scale.nbytes) for weight, scale in first)
    cache = torch.cuda.get_device_properties(0).L2_cache_size
    copies = [first] + [[(w.clone(), s) for w, s in first] for _ in range(min(256, 4 * cache // size))]
    x = torch.randn(rows, SHAPES[name][0], device="cuda", dtype=torch.bfloat16)
    gate = torch.randn_like(x) if "gate" in name else None
    found = []
    for tile in (None, *OTHERS):
        row: dict[str, Any] = {"product": name, "rows": rows, "tile": str(tile or tile_of(rows, first[0][0]))}

        def ours(weights: list[Weight], tile: Tile | None = tile) -> tuple[torch.Tensor, ...]:
            second = weights[1] if len(weights) > 1 else None
            return few_matmul(x, *weights[0], gate, second, None if tile is None else (tile, tile))

        try:
            outs = ours(first)
            wanted = [exact(x, gate, weight) for weight in first]
            errors = [float((o.double() - w).norm() / w.norm()) for o, w in zip(outs, wanted, strict=True)]
            taken = microseconds([lambda weights=weights: ours(weights) for weights in copies])
            row |= {"error": max(errors), "us": taken, "of_copy_bandwidth": size / taken / 1e3 / copy_gb_s}
        except Exception as error:
            row["refused"] = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        found.append(row | {"chosen": tile is None})
    plain = [[dequantize_block(w, s, torch.bfloat16) if s is not None else w for w, s in first]] + [
        [torch.randn(w.shape, device="cuda", dtype=torch.bfloat16) for w, _ in first] for _ in copies[1:]
    ]
    taken = microseconds([lambda each=each: [functional.linear(x, w) for w in each] for each in plain])
    return [*found, {"product": name, "rows": rows, "tile": "functional.linear in bf16", "us": taken}]


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    parser.add_argument("--rows", default="1,2,3,4,5,8,16")
    parser.add_argument("--only", choices=SHAPES)
    arguments = parser.parse_args()
    copy_gb_s = measure_ceilings()["ceilings"]["copy_gb_s"]
    found = []
    for name in [arguments.only] if arguments.only else SHAPES:
        for rows in map(int, arguments.rows.split(",")):
            for row in measure(name, rows, copy_gb_s):
                print(json.dumps(row), flush=True)
                found.append(row)
    gpu = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "copy_gb_s": copy_gb_s}
    arguments.file.write_text(json.dumps(gpu | {"measured": found}, indent=1) + "\n")


if __name__ == "__main__":
    main()
