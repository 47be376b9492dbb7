"""The interpreter accepts what a GPU's compiler refuses, so these kernels are compiled for GPUs without having one."""

import json

import pytest

from tests.helpers import output_of, tritons

SMALLEST_SHARED_MEMORY = 99 * 1024  # bytes a program may use on compute capability 8.6 and 8.9
ALWAYS = "_grouped_kernel"  # begins early
EITHER = """
_rms_norm_kernel _qk_norm_rope_kernel _route_kernel few_matmul_kernel gate_up_kernel down_kernel _weighted_sum_kernel
"""  # as there are many tokens or few
LATE = """
_sigmoid_gate_kernel _add_shared_expert_kernel _place_kernel _block_fp8_matmul_kernel
_chunk_count_kernel _running_count_kernel _chunk_place_kernel _apart_kernel _ordered_kernel
"""
ROUNDING = "_quantize_tokens_kernel _ends_kernel _copy_rows_kernel _activate_rows_kernel _tall_kernel"


@pytest.mark.parametrize("triton", tritons(), ids=lambda folder: "of the GPUs" if folder else "installed")
@pytest.mark.parametrize("capability", [90, 80])
def test_every_kernel_compiles_and_fits(capability: int, triton: str) -> None:
    shared = json.loads(output_of("tests.kernels.compile_layers", str(capability), triton=triton)[-1])
    expected = {*f"{ALWAYS} {EITHER} {LATE}".split()}
    if capability >= 90:
        expected = {*f"{EITHER} {LATE} {ROUNDING}".split()}
        expected |= {f"{name}, early" for name in f"{ALWAYS} {EITHER} _walking_kernel".split()}
    assert set(shared) == expected
    assert all(size <= SMALLEST_SHARED_MEMORY for size in shared.values()), shared
