"""What a step takes from the engine, so that the table of what runs is whole. Nothing of it is called here."""

from .dispatch import Choice, declare
from .gemm.few import MAX_ROWS, UNEVEN_ROWS
from .gemm.policy import FP8_CAPABILITY
from .gpus import NO_GPU, Target

ENGINE, PLUGIN = "engine", "this plugin"


def _projections(target: Target) -> list[Choice]:
    fp8 = "the engine's FP8 product"
    if target is not NO_GPU and target.capability < FP8_CAPABILITY:
        fp8 = "the engine's Marlin kernel, as there are no FP8 units"
    few = Choice(
        f"up to {MAX_ROWS} rows, weights as loaded, FP8 in blocks too",
        PLUGIN,
        "few_matmul, in one launch, of one row with the norm before it; up to "
        f"{UNEVEN_ROWS} where tiles of a wide FP8 weight leave most of a round idle",
    )
    return [
        *([] if target is NO_GPU else [few]),
        Choice("bf16, fp16 and fp32 weights", ENGINE, "torch's library (cuBLAS on a GPU)"),
        Choice("FP8 blocks", ENGINE, fp8),
        Choice("FP8, a rank's slice ending inside a block", PLUGIN, "block_fp8_matmul, as engines refuse it"),
        Choice("INT4 and INT8 weights", PLUGIN, "quantized_matmul"),
    ]


declare("attention over the cache", cuda=(Choice(runs=ENGINE, why="as its attention backend is set"),), own=False)
declare("linear projections and router", cuda=_projections, own=False)
declare("embedding, logits, sampling", cuda=(Choice(runs=ENGINE),), own=False)
declare("sums over ranks", cuda=(Choice("tensor and expert parallelism", ENGINE),), own=False)
