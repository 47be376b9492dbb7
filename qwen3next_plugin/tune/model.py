"""What a tile takes and how long a product should take: estimates, for leaving out what cannot win.

Resources follow Triton's lowering, seen by compiling the kernel (tests/kernels/moe_config_compile.py): synchronous
products keep stages - 1 copies of a step's operands in shared memory, Hopper's asynchronous ones (tiles of 64 rows and
more) keep one more, and FP8 weights that are widened for them pass through shared memory once again. Times are a
roofline (Williams et al. 2009) an SM and over the GPU: memory, L2 cache, bytes in flight (Little's law), shared memory
and tensor cores, with whole waves. The constants below are assumptions about NVIDIA GPUs since Ampere, not measured.
Latency, step and line were set with an eye on tiles that vLLM and SGLang ship for like shapes: that the model's choices
resemble theirs is no evidence for it.
"""

import math

from qwen3next_plugin.kernels.gpus import KIB, Gpu
from qwen3next_plugin.kernels.moe.config import MoeConfig, Tile

from .problem import Problem, Product

REGISTERS = 65536  # of an SM, 32 bits each
THREADS = 2048  # an SM holds at most; 1536 on 8.6, 8.9 and 12.x
MOST_REGISTERS = 264  # a thread can name 255; above it values spill to memory, a few of which do no harm
_CLOCK = 1.7e9
_LATENCY = 1.5e-6  # seconds from asking a busy memory for bytes to having them
_STEP = 60e-9  # seconds of a step over the depth that neither loads nor multiplies: barriers, addresses
_WHOLE_LINE = 128  # bytes of a row that memory and L2 cache move at their best
_START = 1.5e-6  # seconds of a wave that neither loads weights nor multiplies
_REACHED = 0.85  # share of the memory's and the tensor cores' figures that good kernels reach
_SYNCHRONOUS = 0.6  # share of Hopper's and Blackwell's tensor cores that synchronous products can use
_SYNCHRONOUS_FP8 = 0.3  # where both sides are FP8: half a tile of rows took longer than a padded one on an H100
_SHARED_BYTES = 128  # a clock and SM
_L2_BYTES = 64  # a clock and SM
_WIDENED = 64  # FP8 values an SM turns into bf16 a clock


def asynchronous(gpu: Gpu, block_m: int, tile: Tile) -> bool:
    """Whether Triton makes the product with the tensor cores' asynchronous instructions."""
    return gpu.capability[0] in (9, 10) and block_m >= 64 and tile.num_warps % 4 == 0


def shared_memory(gpu: Gpu, product: Product, block_m: int, tile: Tile) -> int:
    """Bytes that a program holds in shared memory, at most."""
    rows = block_m * tile.block_k * product.activation_bytes
    weights = tile.block_k * tile.block_n * product.matrices * product.weight_bytes
    factors = 4 * tile.block_n * product.matrices if product.scale_depth else 0
    factors += 256 if gpu.capability[0] == 10 else 0  # barriers of its tensor cores
    if not asynchronous(gpu, block_m, tile):
        return max(1, tile.num_stages - 1) * (rows + weights) + factors
    if product.activation_bytes == product.weight_bytes:
        return tile.num_stages * (rows + weights) + factors
    widened = tile.block_k * tile.block_n * product.matrices * product.activation_bytes
    return tile.num_stages * rows + max(1, tile.num_stages - 1) * weights + widened + factors


def registers(gpu: Gpu, product: Product, block_m: int, tile: Tile) -> int:
    """Registers that a thread would like to have: sums, a step's own sums where factors are applied, and operands.

    Fitted to what ptxas took for 20 tiles on 8.9, 9.0 and 10.0 (Triton 3.9).
    """
    sums = block_m * tile.block_n * product.matrices // (32 * tile.num_warps)
    scaled = product.scale_depth is not None
    if asynchronous(gpu, block_m, tile):
        if gpu.capability[0] == 10:  # sums lie in tensor memory, and come to the registers for the factors
            return sums * (3 if scaled else 1) + 60
        return sums * (2 if scaled else 1) + 70 + 58 * (product.matrices - 1)
    along_rows = min(tile.num_warps, block_m // 16)
    rows, columns = block_m // along_rows, tile.block_n * along_rows // tile.num_warps
    operands = (rows + columns) * tile.block_k * product.activation_bytes // 128
    return sums * (2 if scaled else 1) + min(operands, 128) + 20


def fits(gpu: Gpu, product: Product, block_m: int, tile: Tile) -> bool:
    """Whether a tile can run on the GPU, and well.

    It must fit the shared memory and the registers, and divide what one FP8 factor covers; asynchronous products are at
    least 64 columns wide (narrower ones were seen wrong on an H200, benchmarks/NOTES.md).
    """
    if product.scale_depth and tile.block_k > product.scale_depth:
        return False
    if asynchronous(gpu, block_m, tile) and tile.block_n < 64:
        return False
    taken = shared_memory(gpu, product, block_m, tile) <= gpu.shared_memory
    return taken and registers(gpu, product, block_m, tile) <= MOST_REGISTERS


def resident(gpu: Gpu, product: Product, block_m: int, tile: Tile) -> int:
    """Programs that one SM runs at a time; 0 if it can run none."""
    threads = 32 * tile.num_warps
    most = THREADS if gpu.capability in ((8, 0), (9, 0), (10, 0)) else 1536
    by_shared = (gpu.shared_memory + KIB) // (shared_memory(gpu, product, block_m, tile) + KIB)
    by_registers = REGISTERS // (min(registers(gpu, product, block_m, tile), 255) * threads)
    return min(by_shared, by_registers, most // threads)


def product_seconds(gpu: Gpu, problem: Problem, product: Product, tokens: int, block_m: int, tile: Tile) -> float:
    """An estimate of one product's time; infinite for a tile that does not fit."""
    if not fits(gpu, product, block_m, tile):
        return math.inf
    at_a_time = resident(gpu, product, block_m, tile)
    if at_a_time < 1:
        return math.inf
    programs = problem.tiles(tokens, block_m) * math.ceil(product.columns / tile.block_n)
    depth = math.ceil(product.depth / tile.block_k) * tile.block_k
    weights = tile.block_n * depth * product.matrices * product.weight_bytes
    rows = block_m * depth * product.activation_bytes
    # memory: each touched expert's weights once, rows in and out once
    touched = problem.touched(tokens) * product.columns * product.depth * product.matrices * product.weight_bytes
    pairs = problem.pairs(tokens)
    moved = touched + pairs * (product.depth * product.activation_bytes + 2 * product.columns)
    busy = min(float(gpu.sms), programs)
    a_turn = min(at_a_time, math.ceil(programs / gpu.sms))
    step = (block_m * product.activation_bytes + tile.block_n * product.matrices * product.weight_bytes) * tile.block_k
    an_sm = min(a_turn * (tile.num_stages - 1) * step / _LATENCY, _L2_BYTES * _CLOCK)
    line = min(1.0, 0.5 + 0.5 * tile.block_k * product.weight_bytes / _WHOLE_LINE)
    memory = max(moved / (_REACHED * gpu.bandwidth * 1e9), programs * (weights + rows) / (busy * an_sm)) / line
    # a program's own work, by whole rounds over the SMs
    peak = (gpu.fp8 or gpu.bf16) if product.activation_bytes == 1 else gpu.bf16
    share = _REACHED
    if gpu.capability[0] in (9, 10) and not asynchronous(gpu, block_m, tile):
        share *= _SYNCHRONOUS if product.activation_bytes > 1 else _SYNCHRONOUS_FP8
    multiply = 2 * block_m * tile.block_n * depth * product.matrices / (share * peak * 1e12 / gpu.sms)
    through_shared = (rows + weights) / (_SHARED_BYTES * _CLOCK)
    widen = 0.0
    if product.activation_bytes > product.weight_bytes:
        widen = tile.block_n * depth * product.matrices / (_WIDENED * _CLOCK)
    barriers = _STEP * depth / tile.block_k / a_turn
    work = math.ceil(programs / gpu.sms) * (max(multiply, through_shared) + widen + barriers)
    return max(memory, work) + math.ceil(programs / (gpu.sms * at_a_time)) * _START


def config_seconds(gpu: Gpu, problem: Problem, tokens: int, config: MoeConfig) -> float:
    """An estimate of both products' time; infinite for a config that does not fit."""
    gate_up, down = problem.products(problem.activation_bytes(tokens, gpu))
    return product_seconds(gpu, problem, gate_up, tokens, config.block_m, config.gate_up) + product_seconds(
        gpu, problem, down, tokens, config.block_m, config.down
    )
